"""Other libraries as oracles: peft, LyCORIS, diffusers."""
