# shellcheck shell=bash disable=SC2034
# Shared by the scripts in this folder: where things are, the pin, how the scripts speak and run git.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SELF=$(basename "$0")
LLAMA=$ROOT/llama.cpp
PATCHES=$ROOT/patches
VENV=$ROOT/.venv
CACHE=$ROOT/.cache
BUILD=${MOE_HOT_BUILD_DIR:-$ROOT/build}
case $BUILD in /*) ;; *) BUILD=$PWD/$BUILD ;; esac

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

# The line of a log that says why a command failed: the last one that calls itself an error, else the last one.
reason() {
    { grep -aiE '(^|[^a-z])(error|fatal):|No space left' "$1" || grep -aE '[^[:space:]]' "$1" || echo "no output"; } |
        tail -n 1 | cut -c 1-300
}

# Runs a long command with its output in a log and shows how far it is: what runs, then the log's last line now
# and then. Returns the command's status.
# usage: progress WHAT LOG COMMAND...
progress() {
    local what=$1 log=$2 start=$SECONDS status=0 every=30 ticker
    shift 2
    [ ! -t 2 ] || every=5
    mkdir -p "$(dirname "$log")"
    : > "$log"
    say "$what ..."
    # The command stays in the foreground so that Ctrl-C reaches it. The ticker's sleep holds none of our files, or
    # whoever reads our output would wait for it.
    (
        while sleep $every > /dev/null 2>&1 && kill -0 $$ 2> /dev/null; do
            say "$what: $((SECONDS - start)) s: $(tr '\r' '\n' < "$log" | tail -n 1 | cut -c 1-100)"
        done
    ) 9>&- &
    ticker=$!
    "$@" > "$log" 2>&1 < /dev/null || status=$?
    { kill "$ticker" && wait "$ticker"; } 2> /dev/null || true
    [ "$status" -ne 0 ] || say "$what: done in $((SECONDS - start)) s"
    return "$status"
}

# As progress, and a failure is the end: one line with the reason, the caller's $hint and the log.
run() { progress "$@" || die "$1 failed: $(reason "$2"): ${hint:-see the log} (log: $2)"; }

# git as it is without anyone's settings (signing, hooks, line ends, patch format), so that the same patches give the
# same commits, and the same commits the same patches, on every machine. Not for fetching, which needs the user's
# proxies and certificates.
git_plain() {
    GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_COMMITTER_NAME=moe-hot GIT_COMMITTER_EMAIL=moe-hot@localhost \
        git -c init.defaultBranch=moe-hot -c core.hooksPath=/dev/null -c safe.directory='*' "$@"
}
git_llama() { git_plain -C "$LLAMA" "$@"; }

# A git hook that runs these scripts must not turn them to its own repository.
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_COMMON_DIR GIT_PREFIX

# A series of patches: one digest for the names and bytes of the *.patch files of a folder.
series() {
    local patch
    for patch in "$1"/*.patch; do
        [ ! -e "$patch" ] || (cd "$1" && sha256sum "${patch##*/}")
    done | sha256sum | cut -d' ' -f1
}

# What has been applied, last one last: lines "HEAD SERIES" in a file inside llama.cpp/.git. A HEAD found there can be
# made again from patches, so it may be replaced; any other commit is the user's.
APPLIED=.git/moe-hot-applied
# usage: was_applied HEAD [SERIES]
was_applied() { grep -q "^$1 ${2-}" "$LLAMA/$APPLIED" 2> /dev/null; }
# usage: record_applied REPOSITORY COMMIT
record_applied() { echo "$(git_plain -C "$1" rev-parse "$2") $(series "$PATCHES")" >> "$1/$APPLIED"; }
# Is patches/ what llama.cpp/ was last made from, or exported to?
patches_are_applied() { [ "$(tail -n 1 "$LLAMA/$APPLIED" 2> /dev/null | cut -d' ' -f2)" = "$(series "$PATCHES")" ]; }

# Writes the commits from moe-hot-pin to HEAD of llama.cpp/ as patches into a folder: no hashes of commits, no git
# version, no line counts, full blob ids, so that the bytes depend on the commits alone.
export_series() {
    git_llama format-patch -q --zero-commit --no-signature --no-stat --no-numbered --full-index \
        -o "$1" moe-hot-pin..HEAD
}

# Makes sure of the commit that patches are counted from. A checkout that setup did not make has the pin, but not the name.
name_pin() {
    git_llama rev-parse -q --verify 'moe-hot-pin^{commit}' > /dev/null ||
        git_llama tag moe-hot-pin "$PIN_COMMIT" 2> /dev/null ||
        die "llama.cpp/ does not contain the pinned commit ${PIN_COMMIT:0:9}: move it away and run scripts/setup"
    git_llama merge-base --is-ancestor moe-hot-pin HEAD ||
        die "llama.cpp/ has HEAD on something else than the pinned commit ${PIN_COMMIT:0:9}: check out the branch moe-hot there"
}

# Environment for cargo, cmake and ninja: the project's own tools, and a ccache that works across clones.
build_env() {
    export PATH=$VENV/bin:$PATH CCACHE_BASEDIR=/ CCACHE_NOHASHDIR=1
    local native
    for native in "$VENV"/lib/python3*/site-packages/clang/native; do
        export LIBCLANG_PATH=$native
    done
    # libclang from a package brings no headers of the compiler (stddef.h, ...), and bindgen finds those of clang
    # only where there is a clang to ask.
    if ! command -v clang > /dev/null; then
        export BINDGEN_EXTRA_CLANG_ARGS
        BINDGEN_EXTRA_CLANG_ARGS="-isystem $(cc -print-file-name=include)"
    fi
}

# The CUDA toolkit from the Python package index, for machines without one: the compiler, and what ggml links to.
CUDA_VENV=$CACHE/cuda
CUDA_COMPILER=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96)
CUDA_LIBRARIES=(nvidia-cublas==13.1.0.3 nvidia-cuda-cccl==13.0.85)

# usage: cuda_packages WHAT PACKAGE...
cuda_packages() {
    local what=$1 stamp=$CUDA_VENV/.moe-hot-$1 libraries lib
    shift
    [ "$(cat "$stamp" 2> /dev/null)" != "$*" ] || return 0
    [ -x "$CUDA_VENV/bin/pip" ] || python3 -m venv "$CUDA_VENV" || die "python3 cannot make a virtual environment in $CUDA_VENV"
    hint="or install the CUDA toolkit and put nvcc on the PATH" \
        run "installing the CUDA toolkit ($what)" "$CACHE/log/cuda-$what.log" "$CUDA_VENV/bin/pip" install -q "$@"
    # the packages are cut for use from Python: CMake looks for lib64 and for libraries without a version
    libraries=$(echo "$CUDA_VENV"/lib/python3*/site-packages/nvidia/cu13)
    ln -sfn lib "$libraries/lib64"
    for lib in cudart cublas cublasLt; do
        [ ! -e "$libraries/lib/lib$lib.so.13" ] || ln -sf "lib$lib.so.13" "$libraries/lib/lib$lib.so"
    done
    echo "$*" > "$stamp"
}

# Sets NVCC: this machine's compiler for CUDA, else one from the package index, with libraries when asked for.
# usage: find_nvcc compiler|libraries
find_nvcc() {
    NVCC=${CUDACXX-}
    [ -n "$NVCC" ] || NVCC=$(command -v nvcc) || { [ ! -x /usr/local/cuda/bin/nvcc ] || NVCC=/usr/local/cuda/bin/nvcc; }
    [ -z "$NVCC" ] || return 0
    cuda_packages compiler "${CUDA_COMPILER[@]}"
    [ "$1" = compiler ] || cuda_packages libraries "${CUDA_LIBRARIES[@]}"
    NVCC=$(echo "$CUDA_VENV"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
}

# A llama.cpp later than the pin, in a package of the Rust registry.
UPSTREAM_PACKAGE=llama-cpp-sys-4
UPSTREAM_VERSION=0.11.0
UPSTREAM_SHA256=814738cddce0c910aa0f5192fd9d3e2ff7e447453e66326dd2f5df7f1375aea3
UPSTREAM_DIR=$CACHE/upstream

# Has cargo fetch it, and sets UPSTREAM_SOURCE to its llama.cpp, which is the registry's and must not be changed.
upstream_source() {
    local project=$UPSTREAM_DIR/fetch name="$UPSTREAM_PACKAGE $UPSTREAM_VERSION"
    need cargo "install a Rust toolchain (https://rustup.rs) and have ~/.cargo/bin in PATH"
    mkdir -p "$project"
    # a package that needs it makes cargo fetch it; a workspace of its own keeps it apart from ours
    printf '%s\n' '[package]' 'name = "fetch"' '[lib]' 'path = "none.rs"' '[dependencies]' \
        "$UPSTREAM_PACKAGE = \"=$UPSTREAM_VERSION\"" '[workspace]' > "$project/Cargo.toml"
    hint="check the network and the settings of cargo, then run again" \
        run "fetching $name" "$CACHE/log/upstream-fetch.log" cargo fetch --manifest-path "$project/Cargo.toml"
    # cargo has compared it with the package
    grep -qF "checksum = \"$UPSTREAM_SHA256\"" "$project/Cargo.lock" || die "$name is not the package of sha256 $UPSTREAM_SHA256"
    UPSTREAM_SOURCE=$(cargo metadata --offline --format-version 1 --manifest-path "$project/Cargo.toml" |
        grep -oE "\"manifest_path\":\"[^\"]*/$UPSTREAM_PACKAGE-$UPSTREAM_VERSION/Cargo.toml\"" | cut -d'"' -f4)
    UPSTREAM_SOURCE=${UPSTREAM_SOURCE%/Cargo.toml}/llama.cpp
    [ -d "$UPSTREAM_SOURCE" ] || die "$name has no llama.cpp"
}
