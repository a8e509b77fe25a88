// What a step needs, by its settings: methods of `ParamsSrkl` in src/params.rs.
#pragma once

#include "abi.h"

// Whether every element has its own brake.
__device__ inline bool has_element_brakes(const SrklGroup &p) {
    return p.scope == SRKL_ELEMENT || p.scope == SRKL_MIXED;
}
