"""Norms and streams with hidden channels at zero, by the long way: loops over channels in float64."""

import torch


def norm_with_zeros(x, weight, kept, eps, offset=0.0):
    """Outputs, at the kept channels, of the norm over all channels of a vector whose other channels are zero."""
    masked = [value if i in kept else 0.0 for i, value in enumerate(x)]
    square = sum(value * value for value in masked) / len(masked)
    return [masked[i] / (square + eps) ** 0.5 * (offset + weight[i]) for i in sorted(kept)]


def silence(model, gone):
    """Sets to zero, in place, what writes the channels ``gone`` into the residual stream, and nothing else."""
    with torch.no_grad():
        for channel in gone:
            model.model.embed_tokens.weight[:, channel] = 0.0
            for layer in model.model.layers:
                for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    writer.weight[channel] = 0.0
                    if writer.bias is not None:
                        writer.bias[channel] = 0.0


def read_products(model, sequences, loss):
    """For every reader of the stream, and every sequence: inputs times gradients there, [T, H]; one leaf for each reader.

    Readers are q, k, v, gate and up of each layer, and the head. Their inputs are detached from each other by running
    the reader on a copy that gathers a gradient of its own.
    """
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    readers = [layer.get_submodule(name) for layer in model.model.layers for name in names] + [model.lm_head]
    found = []
    for ids in sequences:
        copies = []

        def hook(module, args, copies=copies):
            copy = args[0] + torch.zeros_like(args[0], requires_grad=True)
            copy.retain_grad()
            copies.append(copy)
            return (copy,)

        handles = [reader.register_forward_pre_hook(hook) for reader in readers]
        total, _ = loss(model, ids)
        total.backward()
        for handle in handles:
            handle.remove()
        found.append([(copy * copy.grad).detach()[0] for copy in copies])
    return found
