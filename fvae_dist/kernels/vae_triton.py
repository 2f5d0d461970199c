"""The VAEs of adapted layers with one input, in Triton kernels that each do one thing.

Forward: pack the weights in 16 bit; x times both trunks (encode); heads, sampling, KL and the decoder's hidden layers
(latents); the decoder's likelihood. Backward: the same in reverse, then the gradients to x and to the parameters.
Nothing of shape (T, D) is written but the gradient to x: the reconstruction is recomputed tile by tile; in the backward
of many tokens it is written after all, a part of them at a time, for the matrix library to multiply (`likelihood.py`).
Sums over D are split into chunks, whose partial sums the next kernel adds up.

No product has 64 rows or more in a program of four warps, where Triton takes Hopper's warp-group instructions: the
assembler of CUDA before 13.3, which Triton 3.6 and 3.7 bring, makes wrong code of several of them in a kernel (invalid
reads of shared memory, as triton-lang/triton #11366 and #11781 describe).

Everything random is a function of (token key, salt, counter), as `fvae_dist.adapter.noise` defines it.

An adapter's parameters come as two flat ones. Its weights: of both trunks, (H, D) each, the decoder's output weight
(D, W), the heads of mean and log-variance (R, H) of one encoder and of the other, the decoder's hidden layers (W, in).
Its biases: the decoder's output bias (D) and scale (D), both trunks' (H each), the heads' (R), the hidden layers' (W).
The wide weights, the trunks' and the output's, are packed in x's dtype (`packed`, the up-projections behind them); the
others become one fp32 vector (`parameters`) in the order output bias, scale, trunks' biases, then weight and bias of
each head and hidden layer. Gradients leave in the order trunks, output weight, and on as in `parameters`, one row for
each program, to be added up in a fixed order: no atomics, so that two runs are equal bit for bit.

Sizes: G adapters, T tokens, D features, R latent dimensions, H width of the trunks, W of the decoder, DEPTH its hidden
layers, Z what it reads (2R, or R for the average); GB, RB, HB, WB are padded to a power of two, BT and BD are tiles.
"""


# mypy: ignore-errors

from triton.runtime.interpreter import InterpretedFunction

from fvae_dist.kernels.triton_backward import (
    backward_features_kernel,
    backward_inner_kernel,
    backward_input_kernel,
    backward_latents_kernel,
    backward_likelihood_kernel,
)
from fvae_dist.kernels.triton_forward import encode_kernel, latents_kernel, likelihood_kernel, pack_kernel
from fvae_dist.kernels.triton_residual import backward_residual_kernel

__all__ = [
    "INTERPRETED",
    "backward_features_kernel",
    "backward_inner_kernel",
    "backward_input_kernel",
    "backward_latents_kernel",
    "backward_likelihood_kernel",
    "backward_residual_kernel",
    "encode_kernel",
    "latents_kernel",
    "likelihood_kernel",
    "pack_kernel",
]
INTERPRETED = isinstance(latents_kernel, InterpretedFunction)
