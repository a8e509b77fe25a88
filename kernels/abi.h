// The structs that the kernels share with Rust. bindgen makes src/cuda/abi.rs from this file.
//
// All addresses are device addresses. Sizes and offsets are the same on both sides: 8-byte members
// first, no padding.
#pragma once

// Elements in a chunk and lanes of a sum: src/numerics.rs explains them.
#define SRKL_CHUNK 8192
#define SRKL_LANES 1024

// How many elements of a block are compared with their masters before a step.
#define SRKL_PROBES 32

// Dtypes of parameters and gradients.
#define SRKL_F32 0
#define SRKL_F64 1
#define SRKL_BF16 2
#define SRKL_F16 3

// Scopes.
#define SRKL_TENSOR 0
#define SRKL_GLOBAL 1
#define SRKL_ELEMENT 2

// Policies for gradients that are not finite.
#define SRKL_SKIP_STEP 0
#define SRKL_SKIP_BLOCK 1
#define SRKL_PROPAGATE 2

// A parameter tensor. Written once.
typedef struct {
    unsigned long long w;           // the parameter, 16-byte aligned
    unsigned long long master;      // its f32 masters, 16-byte aligned, or 0
    unsigned long long n;           // elements
    unsigned long long first_chunk; // the number of its first chunk among those of all blocks
    unsigned int dtype;
    unsigned int group;
} SrklBlock;

// The gradient of a block. Written when an address has changed.
typedef struct {
    unsigned long long address; // of its first element, contiguous from there, or 0 for none
    unsigned long long dtype;
} SrklGradient;

// The settings of a parameter group.
typedef struct {
    double lr;
    double beta; // the number, tied or not
    double weight_decay;
    double max_grad_norm; // 0 for no clipping
    unsigned int scope;
    unsigned int nonfinite;
} SrklGroup;

// What a step uses that is neither a setting of a group nor a gradient.
typedef struct {
    double schedule;
    double grad_scale;
    unsigned int norm;  // whether any group clips
    unsigned int total; // whether any group needs sums over all blocks
} SrklScalars;

// Sums over a chunk, a block or all blocks: `sum2 * 2^(2 exponent)`, `sum4 * 2^(4 exponent)`.
typedef struct {
    double sum2;
    double sum4;
    long long exponent;
} SrklSums;

// The numbers of one block's step, and its counter.
typedef struct {
    double c;
    double curvature;
    double phi;
    unsigned long long skipped;  // how often this block was skipped alone
    unsigned int step;           // whether the block moves
    unsigned int take_parameter; // whether its masters are to be taken from the parameter
} SrklDecision;

// Counters of the optimizer.
typedef struct {
    unsigned long long steps;
    unsigned long long skipped_steps;
    double grad_norm;
    unsigned int blocks_done; // blocks whose sums are ready, in this step
    unsigned int pad;
} SrklState;

// All that a step's kernels work on.
typedef struct {
    unsigned long long blocks;      // SrklBlock[block_count]
    unsigned long long gradients;   // SrklGradient[block_count]
    unsigned long long groups;      // SrklGroup[]
    unsigned long long scalars;     // SrklScalars
    unsigned long long chunk_block; // unsigned int[chunk_count]: the block of each chunk
    unsigned long long chunk_sums;  // SrklSums[chunk_count]
    unsigned long long chunks_done; // unsigned int[block_count]: chunks whose sums are ready
    unsigned long long block_sums;  // SrklSums[block_count]
    unsigned long long decisions;   // SrklDecision[block_count]
    unsigned long long state;       // SrklState
    unsigned long long block_count;
    unsigned long long live_count; // blocks that are not empty
    unsigned long long chunk_count;
} SrklTable;
