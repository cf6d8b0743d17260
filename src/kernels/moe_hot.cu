// The two nodes of a layer on the GPU. Layouts are those of device/cuda/port.rs.
//
// A captured CUDA graph replays these kernels with the arguments of the capture, so whatever changes from
// step to step (the map, the epoch, the failure mark) lives behind pointers.

#include <cstdint>

// Set in the answer to a row when it could not be computed.
constexpr uint32_t FAILED_BIT = 0x80000000u;
// Set in a row of the usage record when it had no slot, and when it was read over the link.
constexpr uint32_t COLD_BIT = 0x80000000u;
constexpr uint32_t LINK_BIT = 0x40000000u;

// An answer has a cache line of its own: every poll takes the line from the core that wants to write it.
constexpr int ANSWER_STRIDE = 64/sizeof(uint32_t);

// Polls between two looks at the clock.
constexpr int POLLS = 64;

// GPU to CPU, in mapped host memory. The activations follow in memory of their own.
struct Request {
    uint32_t epoch; // last written: all else is in place when it changes
    uint32_t layer;
    uint32_t n_tokens;
    uint32_t n_rows;
    uint32_t pad[12];
    uint32_t rows[]; // row of the result << 16 | expert
};

// GPU to CPU: what a layer routed, read when the step has ended.
struct Usage {
    uint32_t n_rows;   // last written by DISPATCH, zeroed by the CPU
    uint32_t n_tokens;
    uint32_t span_ns;  // from DISPATCH to JOIN
    uint32_t pad[13];
    // then rows[max_rows]:    expert | COLD_BIT | LINK_BIT
    // then wait_ns[max_rows]: how long JOIN waited for a cold row
};

// Addresses that never change while the context lives.
struct Port {
    Request        * request;
    float          * act;        // [max_tokens, act_stride]
    const uint32_t * answers;    // [max_rows, ANSWER_STRIDE]: the epoch, with FAILED_BIT when the row failed
    const float    * out;        // [max_rows, out_stride]
    uint32_t       * error;      // mapped: why the step failed, 1: timed out, 2: a row failed
    uint32_t       * epoch;      // device: epoch of the last request
    uint32_t       * gave_up;    // device: a JOIN of this step has failed, the next do not wait
    uint64_t       * posted_ns;  // device: when the last DISPATCH was through
    uint64_t         bound_ns;
    uint32_t         max_rows;
    uint32_t         act_stride; // in floats
    uint32_t         out_stride;
};

// From memory, not from a cache. The rows are read the same way and only after the answer has come, which
// orders them behind it without a fence.
static __device__ __forceinline__ uint32_t load_from_host(const uint32_t * p) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ void store_release_sys(uint32_t * p, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}

static __device__ __forceinline__ uint64_t now_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

static __device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// slot_ids[t, k] = map[selected[t, k]]; counts all. Of c cold rows the last n_link[c] are read over the link:
// link_ids[t, k] is their expert, -1 for all others. The others are posted with the activations.
// One block: its threads share a barrier, and the flag needs to follow the writes of no other block.
// Shared memory: a byte a row.
extern "C" __global__ void __launch_bounds__(1024) moe_hot_dispatch(
        const Port port, Usage * usage, const int32_t * map, const uint8_t * n_link, const uint32_t layer,
        const float * cur, const uint32_t cur_stride, const uint32_t n_embd,
        const int32_t * selected, const uint32_t selected_stride, const uint32_t n_used, const uint32_t n_tokens,
        int32_t * slot_ids, int32_t * link_ids) {
    __shared__ uint32_t n_cold_shared;
    extern __shared__ uint8_t is_cold[];
    if (threadIdx.x == 0) {
        n_cold_shared = 0;
    }
    wait_for_predecessor();
    __syncthreads();

    const uint32_t n_rows = n_used*n_tokens;
    uint32_t * usage_rows = (uint32_t *) (usage + 1);

    for (uint32_t row = threadIdx.x; row < n_rows; row += blockDim.x) {
        const uint32_t t      = row / n_used;
        const int32_t  expert = selected[t*selected_stride + (row - t*n_used)];
        const int32_t  slot   = map[expert];
        slot_ids[row] = slot;
        is_cold[row]  = slot < 0;
        if (slot < 0) {
            atomicAdd(&n_cold_shared, 1);
        }
    }
    __syncthreads();

    // which rows go where depends on their order alone, so that a run can be repeated
    const uint32_t n_cold = n_cold_shared;
    const uint32_t n_post = n_cold - (link_ids && n_cold <= port.max_rows ? min((uint32_t) n_link[n_cold], n_cold) : 0);
    for (uint32_t row = threadIdx.x; row < n_rows; row += blockDim.x) {
        const uint32_t t      = row / n_used;
        const int32_t  expert = selected[t*selected_stride + (row - t*n_used)];
        uint32_t bits = 0;
        if (is_cold[row]) {
            uint32_t rank = 0; // among the cold rows
            for (uint32_t r = 0; r < row; r++) {
                rank += is_cold[r];
            }
            bits = COLD_BIT;
            if (rank < n_post) {
                port.request->rows[rank] = row << 16 | (uint32_t) expert;
            } else {
                bits |= LINK_BIT;
            }
        }
        usage_rows[row] = (uint32_t) expert | bits;
        if (link_ids) {
            link_ids[row] = bits & LINK_BIT ? expert : -1;
        }
    }
    if (threadIdx.x == 0) {
        usage->n_tokens = n_tokens;
        usage->n_rows   = n_rows;
        *port.posted_ns = now_ns();
    }
    let_successor_start();
    if (n_post == 0) {
        return;
    }

    const uint32_t n4 = n_embd/4;
    for (uint32_t t = 0; t < n_tokens; t++) {
        const float4 * src = (const float4 *) (cur + t*cur_stride);
        float4       * dst = (float4 *) (port.act + t*port.act_stride);
        for (uint32_t i = threadIdx.x; i < n4; i += blockDim.x) {
            dst[i] = src[i];
        }
    }
    if (threadIdx.x == 0) {
        port.request->layer    = layer;
        port.request->n_tokens = n_tokens;
        port.request->n_rows   = n_post;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t epoch = (*port.epoch + 1) & ~FAILED_BIT;
        *port.epoch = epoch;
        store_release_sys(&port.request->epoch, epoch);
    }
}

// Fills the rows of experts without a slot, in place: one block a row. A row of the link is there already, in `linked`;
// for the others a block waits for its row alone.
extern "C" __global__ void __launch_bounds__(256) moe_hot_join(
        const Port port, Usage * usage, const int32_t * slot_ids, const int32_t * link_ids, const float * linked,
        float * experts, const uint32_t row_stride, const uint32_t token_stride, const uint32_t n_embd, const uint32_t n_used) {
    wait_for_predecessor();

    const uint32_t row = blockIdx.x;
    if (row == 0 && threadIdx.x == 0) {
        const uint64_t span = now_ns() - *port.posted_ns;
        usage->span_ns = span > 0xffffffffu ? 0xffffffffu : (uint32_t) span;
    }
    if (slot_ids[row] >= 0) {
        return;
    }
    const uint32_t t   = row/n_used;
    const uint32_t at  = t*token_stride + (row - t*n_used)*row_stride;
    const uint32_t n4  = n_embd/4;
    float4       * dst = (float4 *) (experts + at);
    if (link_ids && link_ids[row] >= 0) {
        const float4 * src = (const float4 *) (linked + at); // of the same shape
        for (uint32_t i = threadIdx.x; i < n4; i += blockDim.x) {
            dst[i] = src[i];
        }
        return;
    }
    __shared__ uint32_t ready;
    if (threadIdx.x == 0) {
        const uint32_t epoch = *port.epoch;
        const uint64_t start = now_ns();
        uint32_t answer = load_from_host(port.answers + row*ANSWER_STRIDE);
        uint64_t waited = 0;
        bool     late   = false;
        bool     others = false; // another row has failed already
        for (int polls = 1; (answer & ~FAILED_BIT) != epoch && !late && !others; polls++) {
            if (polls % POLLS == 0) {
                waited = now_ns() - start;
                late   = waited > port.bound_ns;
                others = *(volatile uint32_t *) port.gave_up != 0;
            }
            answer = load_from_host(port.answers + row*ANSWER_STRIDE);
        }
        ready = answer == epoch;
        if (!ready && !others) {
            *(volatile uint32_t *) port.error   = late ? 1 : 2;
            *(volatile uint32_t *) port.gave_up = 1;
        }
        uint32_t * wait_ns = (uint32_t *) (usage + 1) + port.max_rows;
        waited = now_ns() - start;
        wait_ns[row] = waited > 0xffffffffu ? 0xffffffffu : (uint32_t) waited;
    }
    __syncthreads();

    const float4 * src = (const float4 *) (port.out + row*port.out_stride);
    if (ready) {
        for (uint32_t i = threadIdx.x; i < n4; i += blockDim.x) {
            dst[i] = __ldcv(src + i); // from memory: the row before it had the same address
        }
    } else {
        for (uint32_t i = threadIdx.x; i < n4; i += blockDim.x) {
            dst[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
}
