// Rust's compiler calls these for ThreadSanitizer, gcc's runtime has them under the names of the functions.
// scripts/sanitize links it.
#include <string.h>

void * __tsan_memcpy(void * to, const void * from, size_t n) { return memcpy(to, from, n); }

void * __tsan_memmove(void * to, const void * from, size_t n) { return memmove(to, from, n); }

void * __tsan_memset(void * to, int byte, size_t n) { return memset(to, byte, n); }
