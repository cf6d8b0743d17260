// What `moe-hot probe` runs on the GPU.

#include <cstdint>

// Reads n*16 bytes, in VRAM or in mapped host memory. The sum is stored only if it is what it never is, so that
// the compiler keeps the loads.
extern "C" __global__ void __launch_bounds__(512) moe_hot_read(const uint4 * data, const uint64_t n, uint32_t * sum) {
    const uint64_t step = (uint64_t) gridDim.x*blockDim.x;
    uint64_t i = (uint64_t) blockIdx.x*blockDim.x + threadIdx.x;
    uint32_t s = 0;
    // several loads under way in each thread
    for (; i + 3*step < n; i += 4*step) {
        const uint4 a = __ldcs(data + i);
        const uint4 b = __ldcs(data + i + step);
        const uint4 c = __ldcs(data + i + 2*step);
        const uint4 d = __ldcs(data + i + 3*step);
        s ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        s ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < n; i += step) {
        const uint4 a = __ldcs(data + i);
        s ^= a.x ^ a.y ^ a.z ^ a.w;
    }
    if (s == 0x9e3779b9u) {
        *sum = s;
    }
}

// One thread and the CPU raise flags in turn: flag[0] is the GPU's, flag[16] the CPU's, each in a cache line of its own.
// Stops with flag[32] set when an answer takes longer than bound_ns.
extern "C" __global__ void moe_hot_round_trips(uint32_t * flag, const uint32_t n, const uint64_t bound_ns) {
    for (uint32_t i = 1; i <= n; i++) {
        asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag), "r"(i) : "memory");
        uint64_t start, now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
        uint32_t answer;
        do {
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(answer) : "l"(flag + 16) : "memory");
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
            if (now - start > bound_ns) {
                flag[32] = 1;
                return;
            }
        } while (answer != i);
    }
}
