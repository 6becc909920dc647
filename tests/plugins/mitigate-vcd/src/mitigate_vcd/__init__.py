"""VCD (Visual Contrastive Decoding) as a method of mitigate."""
