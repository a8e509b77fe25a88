// What a step needs, by its settings: methods of `ParamsSrkl` in src/params.rs.
#pragma once

#include "abi.h"

// Whether every element has its own brake.
__device__ inline bool has_element_brakes(const SrklGroup &p) {
    return p.scope == SRKL_ELEMENT || p.scope == SRKL_MIXED;
}

// Whether a direction divides by the root of a second moment.
__device__ inline bool has_second_moment(unsigned int direction) {
    return direction == SRKL_ADAM || direction == SRKL_NESTEROV_ADAM || direction == SRKL_AMSGRAD;
}
