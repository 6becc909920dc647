"""PAI (Paying More Attention to Image) as a method of mitigate."""
