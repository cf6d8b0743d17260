# shellcheck shell=bash
# Shared by the scripts in this folder: where things are, how they speak, the pin.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SELF=$(basename "$0")
LLAMA=$ROOT/llama.cpp
VENV=$ROOT/.venv
CACHE=$ROOT/.cache
BUILD=${MOE_HOT_BUILD_DIR:-$ROOT/build}

# The pin, and the source distribution on the Python package index that carries it.
PIN_COMMIT=0c1e57098bba43ac29e6e3b677cdceebdd22334f
PIN_TREE=b2da53584951ec8aa40680229509a6646a637560
PIN_PACKAGE=llama-cpp-python
PIN_VERSION=0.3.36
PIN_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
PIN_GIT=https://github.com/ggml-org/llama.cpp

say() { printf '%s: %s\n' "$SELF" "$*" >&2; }
die() { printf '%s: error: %s\n' "$SELF" "$*" >&2; exit 1; }
need() { command -v "$1" > /dev/null || die "$1 is missing: $2"; }

# Runs a long command with its output in a log; on failure shows the end of the log.
# usage: quiet WHAT LOG COMMAND...
quiet() {
    local what=$1 log=$2 start=$SECONDS
    shift 2
    say "$what ..."
    if ! "$@" > "$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "$what failed, the whole log is $log"
    fi
    say "$what: done in $((SECONDS - start)) s"
}

git_llama() { git -C "$LLAMA" "$@"; }

# Environment for cargo, cmake and ninja: the project's own tools, and ccache that works across clones.
build_env() {
    export PATH=$VENV/bin:$PATH CCACHE_BASEDIR=/ CCACHE_NOHASHDIR=1
    LIBCLANG_PATH=$(echo "$VENV"/lib/python3*/site-packages/clang/native)
    export LIBCLANG_PATH
    # this libclang brings no headers of its own; those of the compiler will do
    BINDGEN_EXTRA_CLANG_ARGS="-isystem $(cc -print-file-name=include)"
    export BINDGEN_EXTRA_CLANG_ARGS
}
