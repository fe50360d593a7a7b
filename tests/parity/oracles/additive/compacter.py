"""Compacter beside its authors' hypercomplex adapter."""

from __future__ import annotations

from typing import Any, Union

from transformers.activations import get_activation

from tests.methods.bottlenecks import branch
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import link, links
from tests.parity.oracle import Repository, options
from veneer.methods.additive.bottleneck.compacter import Compacter

ORACLE = Repository("rabeehk/compacter", "e123daaaee59488e305297b9685c084edc07b5c0")
METHODS = ("compacter",)


def rows() -> list[Row]:
    """One adapter with its rules, Kronecker order 4, rank 2."""
    inits = ORACLE.definitions("seq2seq/hypercomplex/inits.py", "glorot_normal", "glorot_uniform")
    products = ORACLE.definitions("seq2seq/hypercomplex/kronecker.py", "kronecker_product_einsum_batched")
    layers = ORACLE.definitions(
        "seq2seq/hypercomplex/layers.py", "matvec_product", "PHMLinear", glorot_normal=inits.glorot_normal,
        glorot_uniform=inits.glorot_uniform, kronecker_product_einsum_batched=products.kronecker_product_einsum_batched,
        Union=Union,
    )  # fmt: skip
    acts = ORACLE.definitions("seq2seq/adapters/adapter_utils.py", "Activations", get_activation=get_activation)
    code = ORACLE.definitions(
        "seq2seq/adapters/adapter_modeling.py", "HyperComplexAdapter", PHMLinear=layers.PHMLinear, Activations=acts.Activations
    )
    theirs = code.HyperComplexAdapter(
        options(
            input_dim=16, reduction_factor=2, non_linearity="gelu_new", phm_c_init="normal", hypercomplex_division=4,
            learn_phm=True, hypercomplex_nonlinearity="glorot-uniform", shared_phm_rule=False, factorized_phm=True,
            shared_W_phm=False, factorized_phm_rule=False, phm_rank=2, phm_init_range=0.01, kronecker_prod=False,
        )
    ).double()  # fmt: skip
    theirs.up_sampler.phm_rule = theirs.down_sampler.phm_rule
    perturb(theirs)
    method, site = Compacter(bottleneck=8, order=4, rank=2), branch(width=16)
    ours: Any = method.build(site)
    ours.add_module("shared", method.build_shared([site]))
    ours.double()
    y = randn(2, 7, 16)
    pairs = links(
        ours, theirs, down_left="down_sampler.W_left", down_right="down_sampler.W_right", up_left="up_sampler.W_left",
        up_right="up_sampler.W_right", down_bias="down_sampler.b", up_bias="up_sampler.b",
    )  # fmt: skip
    pairs.append((ours.shared.rules, link(theirs.down_sampler.phm_rule)))
    difference = measure(lambda: ours.output(y, y) - y, lambda: theirs(y), pairs)
    return [Row("compacter", "one adapter: outputs, gradients", difference)]
