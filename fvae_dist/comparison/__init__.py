"""An honest comparison of PEFT methods: the same recipe, steps and number of trials for each of them."""
