"""Numba kernels: one operation per file, forward above backward. Import flashlm_numba.kernels, never kernels.

    embedding       gather rows, scatter gradients without races, clear gradients
    rmsnorm, glu    normalisation and gated linear unit of the trunk
    leaky_average   leaky average of the tokens so far
    ngram_copy      tokens that followed earlier occurrences of the last n tokens
    copy_mixture    their shares in a mixture with a head
    ngram_index     the index in which decoding finds them
    ngrams          n-gram probabilities of a text: lookup in the smoothed tables
    ngram_counts    the tables: counting, modified Kneser-Ney smoothing
    conv            causal dilated grouped convolution with a sigmoid gate
    ternary         ternary values of a weight, 2-bit packing
    ternary_gemv    packed matrix times vectors of int8 or float32
    ternary_gemm    the same for many rows, from codes laid out by columns
    ternary_wgrad   gradients of the ternary weights, from operands rounded to int8
    trunk           all passes through the blocks: weights, buffers, forward, backward
    conv_mixer      FlashLM v3's token mixer
    bitlinear       the MatMul-free LM's ternary layer: norm, rounding, product and gradients
    mlgru           its recurrence
    bit_rows        its norms and gates
    bit_trunk       its trunk: weights, buffers, forward, backward
    bit_decode      its trunk for one token, with a state of one vector per layer
    bit_packed      its trunk and its output layer from packed weights, on all threads, for up to 64 tokens of a text
    decode          the trunk for one token, with a state of constant size
    bitlinear_head  the MatMul-free LM's output layer: inputs for dense_head, logits from packed weights
    dense_head      softmax over all tokens, fused with cross-entropy and its gradients
    low_rank        rows stored as a product of two smaller matrices
    tree_head       softmax at every node of a token's path, loss and gradients
    tree_node       the computation of one node of the tree head
    tree_plan       division of the visited nodes among the threads
    dense_inference logits of one position, from float32 or int8 rows
    tree_inference  the tree head for generation: distribution, descent, the likeliest tokens
    tree_draw       drawing a token from the tree mixed with the n-gram copies, in one call
    writing         several tokens of a text in one call
    draw            the largest of many logits, and sampling from them
    adamw           AdamW; also sparse, for rows with a gradient, or with one second moment per row
    normuon         NorMuon: orthogonalised momentum with normalised rows
    grad_norm       sum of squares of a gradient, for clipping
    ema             exponential moving average of the weights
    reference, reference_trunk, reference_mmf, reference_tree, reference_optim, reference_ngrams
                    NumPy twins, the executable specification (that of decode is the trunk's)

    _jit            the decorators, their compiler flags, the cache of compiled code
    _cache          the files of compiled code: where they are, and whether they are whole
    _entry          what Python does before it enters a region over threads
    _rows           clear, copy, scale and gather rows
    _calls          calls of a kernel by its address
    _text           what the decoding states of all trunks share
    _mixer          the interface of a token mixer
    _steps          the steps of a pass through the trunk
    _division       their division among the threads
    _trunk_arrays   the arrays that the trunk's steps and a mixer's stages share
    _trunk_regions  a thread's part of the trunk's steps, for any mixer
    _conv_training  the stages of the conv mixer
    _bit_arrays     the arrays of the MatMul-free trunk
    _bit_layer      a BitLinear inside its regions
    _bit_regions    a thread's part of its steps
    _bit_packed_regions  a thread's part of its layers from packed weights
    _gradient_copies copies of the gradients of weights: allocation, clearing, sum
    _ternary_layer  a ternary layer inside the trunk's regions
    _ternary_dots   packed rows times int8, one variant per processor
    _ternary_tiles  register tiles of ternary_gemm
    _neon           both for Arm processors
    _arm_features   what an Arm processor can do, as the operating system reports it
    _llvm           pieces of LLVM code
    _blas           matrix products by BLAS inside a parallel region
    _microkernels   small matrix products in registers
    _packed_gemm    large matrix products in registers, with a weight that is laid out once per step
    _elementwise    shares of threads in a flat tensor, sums of squares
    _math, _check   exp as a polynomial; argument checks

This module imports nothing, so a program loads only the kernels that it uses, and Numba with the first of them.
"""

__all__ = [
    "adamw",
    "bit_decode",
    "bit_packed",
    "bit_rows",
    "bit_trunk",
    "bitlinear",
    "bitlinear_head",
    "conv",
    "conv_mixer",
    "copy_mixture",
    "decode",
    "dense_head",
    "dense_inference",
    "draw",
    "ema",
    "embedding",
    "glu",
    "grad_norm",
    "leaky_average",
    "low_rank",
    "mlgru",
    "ngram_copy",
    "ngram_counts",
    "ngram_index",
    "ngrams",
    "normuon",
    "reference",
    "reference_mmf",
    "reference_ngrams",
    "reference_optim",
    "reference_tree",
    "reference_trunk",
    "rmsnorm",
    "ternary",
    "ternary_gemm",
    "ternary_gemv",
    "ternary_wgrad",
    "tree_draw",
    "tree_head",
    "tree_inference",
    "tree_node",
    "tree_plan",
    "trunk",
    "writing",
]
