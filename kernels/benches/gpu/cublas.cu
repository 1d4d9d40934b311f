// cuBLAS's dense bf16 products at the shapes of linear.rs, timed as main.rs times nibble's: events around some calls that take a
// millisecond together, the median of up to 50 such times. For a machine with a CUDA toolkit; nibble itself has no use for one.
//   nvcc -O2 -std=c++17 cublas.cu -lcublas -o cublas && ./cublas [WARM]      WARM: as NIBBLE_BENCH_WARM
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <random>
#include <vector>

#define CHECK(CALL)                                                                                                    \
    if (const int status = (int)(CALL)) {                                                                              \
        fprintf(stderr, "%s: %d\n", #CALL, status);                                                                    \
        exit(1);                                                                                                       \
    }

// Standard normals: one block of them over and over.
static __nv_bfloat16* matrix(size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<__nv_bfloat16> block(65537), values(count);
    for (auto& x : block) x = __float2bfloat16(normal(random));
    for (size_t i = 0; i < count; i++) values[i] = block[i % block.size()];
    __nv_bfloat16* device;
    CHECK(cudaMalloc(&device, 2 * count));
    CHECK(cudaMemcpy(device, values.data(), 2 * count, cudaMemcpyHostToDevice));
    return device;
}

template <typename RUN> static double median_ms(double warm, RUN run) {
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    auto timed = [&](int calls) {
        float ms;
        CHECK(cudaEventRecord(start));
        for (int i = 0; i < calls; i++) run();
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, start, end));
        return (double)ms / calls;
    };
    timed(1);
    const double first = std::max(timed(1), 1e-3), together = std::clamp(std::ceil(1 / first), 1.0, 50.0);
    for (int i = (int)(warm / first); i > 0; i--) run();
    std::vector<double> times((size_t)std::clamp(120 / (together * first), 5.0, 50.0));
    for (double& time : times) time = timed((int)together);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

int main(int count, char** values) {
    const double warm = count > 1 ? atof(values[1]) : 0;
    cublasHandle_t handle;
    CHECK(cublasCreate(&handle));
    const int layers[4][2] = {{4096, 4096}, {1024, 4096}, {14336, 4096}, {4096, 14336}}; // N, K
    for (const auto& layer : layers) {
        const int n = layer[0], k = layer[1];
        for (int t : {8192, 2048, 256}) {
            __nv_bfloat16 *w = matrix((size_t)n * k, 1), *x = matrix((size_t)t * k, 2), *y = matrix((size_t)t * n, 3);
            const float one = 1, zero = 0;
            // In cuBLAS's order, by columns, each matrix is its transpose.
            auto product = [&](cublasOperation_t of_w, int rows, int inner, const void* from, void* to) {
                CHECK(cublasGemmEx(handle, of_w, CUBLAS_OP_N, rows, t, inner, &one, w, CUDA_R_16BF, k, from, CUDA_R_16BF, inner,
                                   &zero, to, CUDA_R_16BF, rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
            };
            auto report = [&](const char* name, double ms) {
                printf("cublas %-12s %5d x %5d x %5d %9.2f us %7.1f TFLOP/s\n", name, t, n, k, ms * 1e3, 2e-9 * t * n * k / ms);
                fflush(stdout);
            };
            report("forward", median_ms(warm, [&] { product(CUBLAS_OP_T, n, k, x, y); }));
            report("input grad", median_ms(warm, [&] { product(CUBLAS_OP_N, k, n, y, x); }));
            for (void* device : {w, x, y}) CHECK(cudaFree(device));
        }
    }
}
