// Matrix products with one accumulator per entry: acc = fma(a[r, k], b[k, n], acc) for k = 0, 1, ..., from acc = 0.
//
// A plain C function on raw memory, called by products.py through ctypes. Each entry is independent of the others, so
// callers may share the rows out among threads.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Compiled twice where the linker can choose when the library is loaded: std::fma is one instruction from AVX2 on.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define VECTORISED __attribute__((flatten, target_clones("arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

EXPORT const std::int64_t version = 1;

// a: rows x inner, b: inner x columns, out: rows x columns, all contiguous.
EXPORT VECTORISED void sequential_product(const float* a, const float* b, float* out, std::int64_t rows,
                                          std::int64_t inner, std::int64_t columns) {
    for (std::int64_t r = 0; r < rows; ++r) {
        float* sums = out + r * columns;
        std::memset(sums, 0, sizeof(float) * columns);
        for (std::int64_t k = 0; k < inner; ++k) {
            const float factor = a[r * inner + k];
            const float* row = b + k * columns;
            for (std::int64_t n = 0; n < columns; ++n) sums[n] = std::fma(factor, row[n], sums[n]);
        }
    }
}
