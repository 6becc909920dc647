"""The decoding loop for stacks that choose tokens themselves."""
