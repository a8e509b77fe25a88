// The structs that the kernels share with Rust. bindgen makes src/backend/cuda/abi.rs from this file.
//
// All addresses are device addresses. Sizes and offsets are the same on both sides: 8-byte members
// first, no padding. bindgen asserts them in Rust, the end of this file in C++.
#pragma once

// Elements in a chunk and lanes of a sum: src/numerics.rs explains them.
#define SRKL_CHUNK 8192
#define SRKL_LANES 1024
#define SRKL_STRIP 32

// How many elements of a block are compared with their masters before a step.
#define SRKL_MASTER_SAMPLES 32

// Compact state: neighbours that share exponents, and the seeds of random offsets (src/compact.rs).
#define SRKL_UNIT 256
#define SRKL_MOMENTS 0x6d6f6d656e747300ull    // "moments\0"
#define SRKL_PARAMETERS 0x726f756e64696e67ull // "rounding"
#define SRKL_AVERAGES 0x6176657261676573ull   // "averages"

// What of a block's state is packed.
#define SRKL_COMPACT 1      // `m` and `v`: codes, filled up to whole units, and behind them their exponents
#define SRKL_SPLIT 2        // `master`: what the parameter lacks to it; behind, samples of the parameter
#define SRKL_AVERAGE_BF16 4 // `average`

// Threads in a CTA (a block of CUDA threads), and how many CTAs a multiprocessor must have room for.
#define SRKL_THREADS 128
#define SRKL_CTAS_PER_SM 8

// Elements that a CTA of srkl_dropout takes at a time: some 16-byte vectors a thread.
#define SRKL_DROPOUT_TILE 2048

// Dtypes of parameters and gradients.
#define SRKL_F32 0
#define SRKL_F64 1
#define SRKL_BF16 2
#define SRKL_F16 3

// Scopes.
#define SRKL_TENSOR 0
#define SRKL_GLOBAL 1
#define SRKL_ELEMENT 2
#define SRKL_MIXED 3

// Directions.
#define SRKL_GRADIENT 0
#define SRKL_MOMENTUM 1
#define SRKL_ADAM 2
#define SRKL_NESTEROV 3 // momentum that looks ahead
#define SRKL_MUON 4
#define SRKL_NESTEROV_ADAM 5
#define SRKL_AMSGRAD 6
#define SRKL_LION 7

// Curvatures.
#define SRKL_GRAD_SQUARE 0
#define SRKL_STEP 1
#define SRKL_HUTCHINSON 2
#define SRKL_NO_CURVATURE 3

// Policies for gradients that are not finite.
#define SRKL_SKIP_STEP 0
#define SRKL_SKIP_BLOCK 1
#define SRKL_PROPAGATE 2

// What a launch of srkl_step does. Where a step is decided on the device, its last launch counts it.
#define SRKL_STATISTICS 1
#define SRKL_DECIDE 2
#define SRKL_UPDATE 4
#define SRKL_COUNT 8
#define SRKL_RECORD 16 // the norms of gradients; the update must sum up too

// Which sums srkl_sums makes, and what becomes of them.
#define SRKL_SUM_DIRECTIONS 0 // the trust clip
#define SRKL_SUM_MEASURING 1  // likewise, and what a step needs that measures the curvature along it
#define SRKL_SUM_STEP 2       // curvature along the step
#define SRKL_SUM_SQUARES 3    // the size of a perturbation
#define SRKL_SUM_PROBE 4      // whether a product with the Hessian is finite
#define SRKL_SUM_AVERAGE 5    // its average
#define SRKL_SUM_PARAMETERS 6 // the squares of all parameters, for telemetry

// What else srkl_gather makes of the sums of all ranks.
#define SRKL_SUM_UPDATE 7        // the sums over a step
#define SRKL_STATISTICS_OF_ALL 8 // decisions

// What a product with the Hessian comes to: `Probe` in src/estimate.rs.
#define SRKL_FINITE 0
#define SRKL_INFINITE 1
#define SRKL_NOTHING 2

// The curvature of a block that has not been measured.
#define SRKL_UNKNOWN -1

// What a measurement has left of an estimate.
#define SRKL_KNOWN 1     // there is one
#define SRKL_LOST 2      // `Left::Lost` in src/estimate.rs
#define SRKL_UNCHANGED 4 // `Left::Unchanged`

// What srkl_replace does with parameters.
#define SRKL_PERTURB 0           // those that have a gradient
#define SRKL_SWAP 1              // by their averages
#define SRKL_RESTORE_PERTURBED 2 // from what was kept
#define SRKL_RESTORE_SWAPPED 3

// Numbers on the device: a gradient, or the room where momentum is orthogonalised. That of a gradient is
// written when an address has changed.
typedef struct {
    unsigned long long address; // of its first element, contiguous from there, or 0 for none
    unsigned long long dtype;
} SrklGradient;

// A parameter tensor, or of a sharded one the elements that are stepped here. Written once.
typedef struct {
    unsigned long long w;           // its first element, 16-byte aligned
    unsigned long long master;      // its masters, 16-byte aligned, or 0
    unsigned long long m;           // its first moment, or 0
    unsigned long long v;           // its second moment, or 0
    unsigned long long v_max;       // the largest so far of SRKL_AMSGRAD, or 0
    unsigned long long average;     // of the parameter, or 0
    unsigned long long q;           // its squared row norms, or 0
    unsigned long long backup;      // room for the parameter as it was, or 0
    unsigned long long n;           // elements that are stepped here
    unsigned long long first;       // the first of them among all of the parameter
    unsigned long long whole;       // all elements of the parameter
    unsigned long long first_chunk; // the number of its first chunk among those of all blocks
    unsigned long long chunk_count;
    unsigned long long all_first; // where `order` has its chunks, of all ranks
    unsigned long long all_count; // and their number
    SrklGradient orthogonal;      // of SRKL_MUON: what its matrices are orthogonalised in
    double matrix_scale;          // and what they are multiplied by then
    unsigned int dtype;
    unsigned int group;
    unsigned int from_end; // whether its last chunk is updated first
    unsigned int place;    // among all parameters of the optimizer
    unsigned int packs;    // SRKL_COMPACT and so on
    unsigned int pad;
} SrklBlock;

// The settings of a parameter group. Written when one has changed.
typedef struct {
    double lr;
    double beta; // the number, tied or not
    double weight_decay;
    double max_grad_norm; // 0 for no clipping
    double trust;         // 0 for no clip
    double average;       // the decay of the parameters' average; 1 for none
    double polynomial;    // or k of a polynomial average; below 0 for none
    double decay1;        // of the first moment
    double gain1;         // the weight of a gradient in it
    double power1;        // the decay that its bias correction goes by; 1 for none
    double ahead_decay;   // of a momentum that looks ahead
    double ahead_gain;    // and the weight of a gradient beside it
    double decay2;        // of the second moment; 1 for none
    double eps;
    double decay; // of the curvature's average
    double every; // steps between two measurements
    double noise; // how much of their variance brakes
    unsigned int scope;
    unsigned int shared; // SRKL_MIXED: 8 p
    unsigned int direction;
    unsigned int curvature;
    unsigned int nonfinite;
    unsigned int ahead;      // SRKL_MUON, SRKL_NESTEROV_ADAM: whether the momentum looks ahead by a step more
    unsigned int stochastic; // whether bf16 parameters without masters are rounded at random
    unsigned int cautious;   // whether elements whose direction is against their gradient stay
} SrklGroup;

// What a step uses that is neither a setting of one group nor a gradient. Written by srkl_set.
typedef struct {
    double schedule;
    double grad_scale;
    unsigned int norm;      // whether any group clips
    unsigned int total;     // whether any group needs sums over all blocks
    unsigned int after_all; // whether no block may move before the statistics of all of them
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

// Two sums in f64 without a scale.
typedef struct {
    double a;
    double b;
} SrklPair;

// Products of decays over the steps that moved a block.
typedef struct {
    double first;
    double second;
    double average;
} SrklPowers;

// What a step that measures leaves of a block: `StepSums` in src/estimate.rs.
typedef struct {
    double step;
    double direction;
    double along;
} SrklStepSums;

// What is known of a block's curvature: `Estimate` in src/estimate.rs.
typedef struct {
    double mean;
    double row_sum_sq; // of SRKL_HUTCHINSON: the sum of q over the block
    double power;
    double variance;
    double entered;
    double curvature; // H, as the brake goes by it
    double reach;     // ||D|| / ||d|| of the last measured step
    double last;
    double lowest;
    double highest;
    unsigned long long in_average;
    unsigned long long infinite;
    unsigned long long still;
    unsigned long long measured_at;
    unsigned long long taken;
    unsigned long long nonfinite;
    unsigned long long unmoved;
    unsigned long long uninformative;
    unsigned long long missing;
} SrklEstimate;

// What stage 1 finds of a block.
typedef struct {
    SrklSums sums;
    unsigned long long reset_master; // whether its masters are to be taken from the parameter
} SrklStatistics;

// The numbers of a block's step.
typedef struct {
    double grad_factor; // what the gradient is multiplied by, unscaling and clipping
    double curvature;
    double phi;
    double scale_m; // 1 / (1 - beta1^t)
    double scale_v; // 1 / (1 - beta2^t)
    double ahead;   // of SRKL_NESTEROV_ADAM (1 - beta1^(t + 1)) / (1 - beta1^t); else 1
    double average;
    SrklPowers powers;        // after the step
    unsigned long long moves; // whether the block moves, unless the whole step is skipped
    unsigned long long small; // whether by a small step, shorter than on flat ground
} SrklDecision;

// Counters and flags of the optimizer.
typedef struct {
    unsigned long long steps;
    unsigned long long skipped_steps;
    double grad_norm;
    double grad_scale; // of the last step
    double probe_size;
    unsigned long long next_statistics; // the next chunk to take; 0 between steps
    unsigned long long next_update;     // likewise
    unsigned int ctas_left;             // CTAs that have left this step; 0 between steps
    unsigned int blocks_done;           // blocks whose statistics are there; 0 between steps
    unsigned int found_inf;             // whether a block wants the step skipped; 0 between steps
    unsigned int skipped;               // whether the last step was skipped
    unsigned int has_norm;              // whether it has computed grad_norm
    unsigned int probe;                 // what the last product with the Hessian came to
    unsigned int recorded;              // whether the last step has recorded norms
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
    unsigned long long chunks_done; // unsigned int[block_count]: chunks whose sums are ready; 0 between steps
    unsigned long long ready;       // unsigned int[block_count]: whether it is decided; 0 between steps
    unsigned long long statistics;  // SrklStatistics[block_count]
    unsigned long long decisions;   // SrklDecision[block_count]
    unsigned long long powers;      // SrklPowers[block_count]
    unsigned long long estimates;   // SrklEstimate[block_count]
    unsigned long long again;       // SrklGradient[block_count]: second gradients of a measurement
    unsigned long long chunk_pairs; // SrklPair[chunk_count]
    unsigned long long pairs;       // SrklPair[block_count]
    unsigned long long step_sums;   // SrklStepSums[block_count]: of a step that measures or records
    unsigned long long strips;      // double[chunk_count * SRKL_CHUNK / SRKL_STRIP]: sums of D^2, or 0
    unsigned long long remaining;   // unsigned int[block_count]: after a measurement SRKL_KNOWN and so on
    unsigned long long skipped;     // unsigned long long[block_count]: how often each was skipped alone
    unsigned long long state;       // SrklState
    unsigned long long block_count;
    unsigned long long live_count; // blocks that have chunks
    unsigned long long chunk_count;
    unsigned long long stages; // what this launch does
    unsigned long long steps;  // taken before, if the host decides; else `state` has them
    // What ranks with sharded state exchange. Each has its own part of these, at `chunk_sums` and so on.
    unsigned long long all_sums;       // SrklSums[]: by rank and chunk
    unsigned long long all_pairs;      // SrklPair[]: likewise
    unsigned long long all_statistics; // SrklStatistics[world_size * block_count]
    unsigned long long order;      // unsigned long long[]: the places of the chunks of each block in these
    unsigned long long world_size; // 0 if nothing is sharded
} SrklTable;

// A matrix of SRKL_MUON. Written once.
typedef struct {
    unsigned long long block;
    unsigned long long start;       // its first element in the block
    unsigned long long n;           // elements
    unsigned long long first_chunk; // the number of its first chunk among those of all matrices
    unsigned long long chunk_count;
} SrklMatrix;

// All that is orthogonalised.
typedef struct {
    unsigned long long matrices;    // SrklMatrix[]
    unsigned long long chunks;      // SrklChunk[chunk_count]: its `block` is the number of a matrix
    unsigned long long chunk_sums;  // SrklSums[chunk_count]
    unsigned long long sums;        // SrklSums[]: by matrix
    unsigned long long chunks_done; // unsigned int[]: by matrix; 0 between launches
    unsigned long long chunk_count;
} SrklMatrices;

#ifdef __cplusplus
#include <cstddef>
static_assert(sizeof(SrklBlock) == 168 && offsetof(SrklBlock, place) == 156, "SrklBlock");
static_assert(sizeof(SrklGradient) == 16 && offsetof(SrklGradient, dtype) == 8, "SrklGradient");
static_assert(sizeof(SrklGroup) == 168 && offsetof(SrklGroup, ahead) == 156, "SrklGroup");
static_assert(sizeof(SrklScalars) == 32 && offsetof(SrklScalars, pad) == 28, "SrklScalars");
static_assert(sizeof(SrklChunk) == 16 && offsetof(SrklChunk, block) == 8, "SrklChunk");
static_assert(sizeof(SrklSums) == 24 && offsetof(SrklSums, exponent) == 16, "SrklSums");
static_assert(sizeof(SrklPair) == 16 && offsetof(SrklPair, b) == 8, "SrklPair");
static_assert(sizeof(SrklPowers) == 24 && offsetof(SrklPowers, average) == 16, "SrklPowers");
static_assert(sizeof(SrklStepSums) == 24 && offsetof(SrklStepSums, along) == 16, "SrklStepSums");
static_assert(sizeof(SrklEstimate) == 152 && offsetof(SrklEstimate, missing) == 144, "SrklEstimate");
static_assert(sizeof(SrklStatistics) == 32 && offsetof(SrklStatistics, reset_master) == 24, "SrklStatistics");
static_assert(sizeof(SrklDecision) == 96 && offsetof(SrklDecision, moves) == 80, "SrklDecision");
static_assert(sizeof(SrklState) == 88 && offsetof(SrklState, recorded) == 80, "SrklState");
static_assert(sizeof(SrklMatrix) == 40 && offsetof(SrklMatrix, chunk_count) == 32, "SrklMatrix");
static_assert(sizeof(SrklMatrices) == 48 && offsetof(SrklMatrices, chunk_count) == 40, "SrklMatrices");
static_assert(sizeof(SrklTable) == 240 && offsetof(SrklTable, steps) == 192, "SrklTable");
#endif
