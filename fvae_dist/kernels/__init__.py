"""Fast forms of the adapter's operations, each beside its plain-torch reference in `fvae_dist.adapter`."""
