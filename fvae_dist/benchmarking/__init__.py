"""What a layer, a training step and attention take, beside the least that the arithmetic and the memory allow."""
