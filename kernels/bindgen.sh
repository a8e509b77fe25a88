#!/usr/bin/env bash
# Makes src/backend/cuda/abi.rs from kernels/abi.h; with --check, fails if it differs from the committed one.
# Needs bindgen (cargo install bindgen-cli) and libclang.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
made=$(mktemp)
trap 'rm -f "$made"' EXIT
bindgen kernels/abi.h --with-derive-default --with-derive-partialeq --no-doc-comments \
    --allowlist-item 'Srkl.*|SRKL_.*' --rust-target 1.88 --rust-edition 2024 >"$made"
if [ "${1:-}" = --check ]; then
    diff src/backend/cuda/abi.rs "$made"
else
    cp "$made" src/backend/cuda/abi.rs
fi
