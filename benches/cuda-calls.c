// Counts a program's calls into the CUDA runtime: preload it, and at the end of the process it writes a line
// "name<TAB>count" each to the file that CUDA_CALLS names. scripts/gpu-check builds and uses it.
//
//   cc -O2 -shared -fPIC -o cuda-calls.so benches/cuda-calls.c -ldl
//   CUDA_CALLS=/tmp/calls LD_PRELOAD=./cuda-calls.so llama-bench ...

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

// Arguments are passed on as they come: all of these take integers and pointers, the first six in registers and
// the others (dim3 by value counts as two) on the stack, where a tail call leaves them. Only a jump does that, hence
// the assembly: count, look the real function up once, jump to it with every argument register as it was.
#if !defined(__x86_64__)
#error "only for x86-64"
#endif

#define CALLS(X)                                                                                                \
    X(cudaGraphLaunch) X(cudaGraphInstantiate) X(cudaGraphExecUpdate) X(cudaStreamBeginCapture)                 \
    X(__cudaLaunchKernel) X(cudaLaunchKernel) X(cudaLaunchKernelExC) X(cudaStreamSynchronize) X(cudaDeviceSynchronize)                \
    X(cudaEventSynchronize) X(cudaStreamWaitEvent) X(cudaMemcpy) X(cudaMemcpyAsync) X(cudaMemcpy2DAsync)        \
    X(cudaMemcpyPeerAsync) X(cudaMemsetAsync)

#define ENTRY(name)                                                                                             \
    static atomic_ulong count_##name;                                                                           \
    static void * real_##name;                                                                                  \
    __attribute__((used)) static void * enter_##name(void) {                                                    \
        atomic_fetch_add_explicit(&count_##name, 1, memory_order_relaxed);                                      \
        if (!real_##name && !(real_##name = dlsym(RTLD_NEXT, #name))) {                                         \
            fprintf(stderr, "cuda-calls: there is no %s\n", #name);                                             \
            abort();                                                                                            \
        }                                                                                                       \
        return real_##name;                                                                                     \
    }                                                                                                           \
    __asm__(".globl " #name "\n.type " #name ", @function\n" #name ":\n"                                        \
            "push %rdi\npush %rsi\npush %rdx\npush %rcx\npush %r8\npush %r9\nsub $8, %rsp\n"                    \
            "call enter_" #name "\n"                                                                            \
            "add $8, %rsp\npop %r9\npop %r8\npop %rcx\npop %rdx\npop %rsi\npop %rdi\njmp *%rax\n");

CALLS(ENTRY)

__attribute__((destructor)) static void report(void) {
    const char * path = getenv("CUDA_CALLS");
    FILE * f = path ? fopen(path, "w") : NULL;
    if (f) {
#define LINE(name) fprintf(f, "%s\t%lu\n", #name, (unsigned long) count_##name);
        CALLS(LINE)
        fclose(f);
    }
}
