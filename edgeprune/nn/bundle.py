"""TEMPORARY stand-in by the lead until the loading helper writes the real file; overwrite it."""

from __future__ import annotations
import hashlib
from copy import deepcopy
from pathlib import Path
import torch
from torch import nn
from safetensors.torch import load_file
from edgeprune.nn import zoo, surgery
from edgeprune.records import Bundle, InputSpec, Plan, Source


class Deployed(nn.Module):
    def __init__(self, network, spec):
        super().__init__()
        self.network = network
        n = spec.shape[0]
        self.register_buffer("mean", torch.tensor(spec.mean or (0.0,) * n).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std or (1.0,) * n).view(1, -1, 1, 1))

    def forward(self, x):
        return self.network((x - self.mean) / self.std)


def deployed(bundle):
    return Deployed(bundle.module, bundle.input).eval()


def sha256_file(p):
    return hashlib.sha256(Path(p).read_bytes()).hexdigest()


def from_module(module, example_inputs, *, mean=(), std=(), source=None):
    m = deepcopy(module).eval()
    with torch.no_grad():
        k = m(example_inputs).shape[1]
    return Bundle(m, source or Source("memory", sha256="memory"), InputSpec(tuple(example_inputs.shape[1:]), k, mean, std))


def load_bundle(t):
    if Path(t.path).suffix == ".pt2":
        from edgeprune.nn.remodulify import remodulify
        ep = torch.export.load(t.path)
        m = remodulify(ep)
        shape = tuple(int(s) for s in ep.example_inputs[0][0].shape[1:])
        return from_module(m, torch.rand(1, *shape), source=Source("pt2", str(Path(t.path).resolve()), sha256_file(t.path)))
    m = zoo.architecture(t.arch)
    m.load_state_dict(torch.load(t.path, weights_only=True))
    c, h, w = map(int, t.input.split("x"))
    b = from_module(m, torch.rand(1, c, h, w), mean=t.mean, std=t.std, source=Source("state_dict", str(Path(t.path).resolve()), sha256_file(t.path), t.arch))
    return b


def rebuild(source, input, plans, weights):
    m = zoo.architecture(source.arch).eval()
    for p in plans:
        surgery.replay(m, p)
    m.load_state_dict(load_file(str(weights)), strict=True)
    return Bundle(m, source, input, plans)
