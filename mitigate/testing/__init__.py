"""Conformance suite: does a method keep the contract? Works without pytest; see `check_method`."""
