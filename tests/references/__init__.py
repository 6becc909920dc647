"""Naive reference implementations of LocoRE, SCR and SGRS, written from the papers' equations only.

They share no code with the library: one sample at a time, the whole sequence recomputed for every token, no cache.
"""
