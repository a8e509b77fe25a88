// The structs that the kernels share with Rust. bindgen makes src/cuda/abi.rs from this file.
//
// All addresses are device addresses. Sizes and offsets are the same on both sides: 8-byte members
// first, no padding. bindgen asserts them in Rust, the end of this file in C++.
#pragma once

// Elements in a chunk and lanes of a sum: src/numerics.rs explains them.
#define SRKL_CHUNK 8192
#define SRKL_LANES 1024

// How many elements of a block are compared with their masters before a step.
#define SRKL_PROBES 32

// Threads in a block of threads, and how many such blocks a multiprocessor must have room for.
#define SRKL_THREADS 128
#define SRKL_BLOCKS_PER_SM 8

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

// What a launch does. The device decides where it has all three, and the host between two launches where
// they have one each.
#define SRKL_STATISTICS 1
#define SRKL_DECIDE 2
#define SRKL_UPDATE 4

// A parameter tensor. Written once.
typedef struct {
    unsigned long long w;           // the parameter, 16-byte aligned
    unsigned long long master;      // its f32 masters, 16-byte aligned, or 0
    unsigned long long n;           // elements
    unsigned long long first_chunk; // the number of its first chunk among those of all blocks
    unsigned long long chunk_count;
    unsigned int dtype;
    unsigned int group;
    unsigned int from_end; // whether its last chunk is updated first
    unsigned int pad;
} SrklBlock;

// The gradient of a block. Written when an address has changed.
typedef struct {
    unsigned long long address; // of its first element, contiguous from there, or 0 for none
    unsigned long long dtype;
} SrklGradient;

// The settings of a parameter group. Written when one has changed.
typedef struct {
    double lr;
    double beta; // the number, tied or not
    double weight_decay;
    double max_grad_norm; // 0 for no clipping
    unsigned int scope;
    unsigned int nonfinite;
} SrklGroup;

// What a step uses that is neither a setting of one group nor a gradient. Written by srkl_set.
typedef struct {
    double schedule;
    double grad_scale;
    unsigned int norm;  // whether any group clips
    unsigned int total; // whether any group needs sums over all blocks
    unsigned int whole; // whether no block may move before the statistics of all of them
    unsigned int pad;
} SrklScalars;

// A part of a block. Written once.
typedef struct {
    unsigned long long start; // its first element in the block
    unsigned long long block;
} SrklChunk;

// Sums over a chunk, a block or all blocks: `sum2 * 2^(2 exponent)`, `sum4 * 2^(4 exponent)`.
typedef struct {
    double sum2;
    double sum4;
    long long exponent;
} SrklSums;

// What stage 1 finds of a block.
typedef struct {
    SrklSums sums;
    unsigned long long take_parameter; // whether its masters are to be taken from the parameter
} SrklStatistics;

// The numbers of a block's step.
typedef struct {
    double c;
    double curvature;
    double phi;
    unsigned long long step; // whether the block moves, unless the whole step is skipped
} SrklDecision;

// Counters and flags of the optimizer.
typedef struct {
    unsigned long long steps;
    unsigned long long skipped_steps;
    double grad_norm;
    unsigned long long next_statistics; // the next chunk to take; 0 between steps
    unsigned long long next_update;     // likewise
    unsigned int left;                  // blocks of threads that have left this step; 0 between steps
    unsigned int blocks_done;           // blocks whose statistics are there; 0 between steps
    unsigned int refused;               // whether a block wants the step skipped; 0 between steps
    unsigned int skipped;               // whether the last step was skipped
    unsigned int has_norm;              // whether it has computed grad_norm
    unsigned int pad;
} SrklState;

// All that a step works on.
typedef struct {
    unsigned long long blocks;      // SrklBlock[block_count]
    unsigned long long gradients;   // SrklGradient[block_count]
    unsigned long long groups;      // SrklGroup[]
    unsigned long long scalars;     // SrklScalars
    unsigned long long chunks;      // SrklChunk[chunk_count]
    unsigned long long chunk_sums;  // SrklSums[]: by chunk
    unsigned long long chunks_done; // unsigned int[block_count]: chunks whose sums are ready
    unsigned long long ready;       // unsigned int[block_count]: whether it is decided; 0 between steps
    unsigned long long statistics;  // SrklStatistics[block_count]
    unsigned long long decisions;   // SrklDecision[block_count]
    unsigned long long skipped;     // unsigned long long[block_count]: how often each was skipped alone
    unsigned long long state;       // SrklState
    unsigned long long block_count;
    unsigned long long live_count; // blocks that have chunks
    unsigned long long chunk_count;
    unsigned long long stages; // what this launch does
} SrklTable;

#ifdef __cplusplus
#include <cstddef>
static_assert(sizeof(SrklBlock) == 56 && offsetof(SrklBlock, pad) == 52, "SrklBlock");
static_assert(sizeof(SrklGradient) == 16 && offsetof(SrklGradient, dtype) == 8, "SrklGradient");
static_assert(sizeof(SrklGroup) == 40 && offsetof(SrklGroup, nonfinite) == 36, "SrklGroup");
static_assert(sizeof(SrklScalars) == 32 && offsetof(SrklScalars, pad) == 28, "SrklScalars");
static_assert(sizeof(SrklChunk) == 16 && offsetof(SrklChunk, block) == 8, "SrklChunk");
static_assert(sizeof(SrklSums) == 24 && offsetof(SrklSums, exponent) == 16, "SrklSums");
static_assert(sizeof(SrklStatistics) == 32 && offsetof(SrklStatistics, take_parameter) == 24,
              "SrklStatistics");
static_assert(sizeof(SrklDecision) == 32 && offsetof(SrklDecision, step) == 24, "SrklDecision");
static_assert(sizeof(SrklState) == 64 && offsetof(SrklState, pad) == 60, "SrklState");
static_assert(sizeof(SrklTable) == 128 && offsetof(SrklTable, stages) == 120, "SrklTable");
#endif
