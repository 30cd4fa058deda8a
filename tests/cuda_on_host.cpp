// The kernels of cuda.cu compiled for a CPU, behind the functions of NVIDIA's driver that nodes.cpp calls.
//
// A launch unpacks its arguments as the driver does, from the types of the kernel's parameters, and runs one thread after
// the other. While `capturing` is set, a launch keeps copies of its arguments instead, and `replay` runs it: as in a CUDA
// graph, what an argument points to is read then.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};
thread_local Dim blockIdx, blockDim, threadIdx;

unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((std::uint64_t{a} * b) >> 32); }
int __popc(unsigned bits) { return __builtin_popcount(bits); }

}  // namespace

namespace nslightning {

struct Float16;
float widened(Float16 x);
void narrowed(float x, Float16& into);

}  // namespace nslightning

#define __global__
#define __launch_bounds__(threads)
#include "../nslightning/ops/kernels/cuda.cu"

namespace nslightning {

float widened(Float16 x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  float size;
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  else if (exponent == 0) size = std::ldexp(static_cast<float>(fraction), -24);
  else size = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return std::copysign(size, x.bits & 0x8000 ? -1.0f : 1.0f);
}

// To the nearest, of two to the even one, which is how nearbyint rounds.
void narrowed(float x, Float16& into) {
  const word sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) {
    into.bits = 0x7FFF;
  } else if (size >= 65520) {
    into.bits = sign | 0x7C00;
  } else if (size < std::ldexp(1.0f, -14)) {
    into.bits = sign | static_cast<word>(std::nearbyint(std::ldexp(size, 24)));
  } else {
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
    const int digits = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));  // 1024 to 2048, which carries over
    into.bits = sign | static_cast<word>(((exponent + 14) << 10) + (digits - 1024));
  }
}

}  // namespace nslightning

namespace {

struct Kernel {
  virtual std::function<void()> with(void** arguments) const = 0;
};

template <typename... Arguments>
struct KernelOf final : Kernel {
  void (*function)(Arguments...);
  explicit KernelOf(void (*function)(Arguments...)) : function(function) {}

  std::function<void()> with(void** arguments) const override {
    return with(arguments, std::index_sequence_for<Arguments...>());
  }

  template <std::size_t... I>
  std::function<void()> with(void** arguments, std::index_sequence<I...>) const {
    return [function = function, copies = std::tuple<Arguments...>(*static_cast<Arguments*>(arguments[I])...)] {
      std::apply(function, copies);
    };
  }
};

template <typename... Arguments>
const Kernel* kernel(void (*function)(Arguments...)) {
  return new KernelOf<Arguments...>(function);
}

#define NAMED(NAME) {#NAME, kernel(NAME)}
#define OF(T)                                                                                                        \
  NAMED(relu_forward_##T), NAMED(relu_backward_##T), NAMED(linear_backward_##T), NAMED(replace_##T),                 \
      NAMED(pool_forward_##T), NAMED(pool_backward_##T), NAMED(pool_forward_wide_##T), NAMED(pool_backward_wide_##T)
const std::map<std::string, const Kernel*> kernels = {OF(float32), OF(float64), OF(bfloat16), OF(float16)};

int context = 0, other_context = 0;
std::vector<std::function<void()>> graph;  // the launches that were captured
thread_local void* current = nullptr;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
int fail = 0;       // what the next launches return
int capturing = 0;  // whether launches are captured
long long launches = 0, loads = 0;
char launched[64] = "";  // the name of the last kernel
}

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuDeviceGet(int* device, int index) { return *device = index, 0; }
EXPORT int cuDevicePrimaryCtxRetain(void** into, int) { return *into = &context, 0; }
EXPORT int cuCtxGetCurrent(void** into) { return *into = current, 0; }
EXPORT int cuCtxSetCurrent(void* to) { return current = to, 0; }
EXPORT int cuModuleLoadData(void** module, const void* image) {
  if (current != &context) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  ++loads;
  *module = &loads;
  return std::strcmp(static_cast<const char*>(image), "an image") ? 200 : 0;  // CUDA_ERROR_INVALID_IMAGE
}
EXPORT int cuModuleGetFunction(const void** function, void*, const char* name) {
  const auto at = kernels.find(name);
  if (at == kernels.end()) return 500;  // CUDA_ERROR_NOT_FOUND
  *function = &*at;
  return 0;
}
EXPORT int cuStreamIsCapturing(void*, int* status) { return *status = capturing, current == &context ? 0 : 201; }
int capture_mode = 0;  // of the thread: 0 refuses what may wait, 2 does not
EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, capture_mode), fail; }
EXPORT int mode_of_captures() { return capture_mode; }
EXPORT int cuGetErrorString(int, const char** into) { return *into = "a failure that a test asked for", 0; }
EXPORT int cuLaunchKernel(const void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* stream, void** arguments, void** extra) {
  if (fail) return fail;
  if (current != &context) return 201;
  if (!x || y != 1 || z != 1 || !bx || bx > 1024 || by != 1 || bz != 1 || shared || extra) return 1;
  const auto& named = *static_cast<const std::pair<const std::string, const Kernel*>*>(function);
  ++launches;
  std::strncpy(launched, named.first.c_str(), sizeof(launched) - 1);
  const auto all_threads = [thread = named.second->with(arguments), x, bx] {
    blockDim = {bx, 1, 1};
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < bx; ++threadIdx.x) thread();
    }
  };
  if (capturing) graph.push_back(all_threads);
  else all_threads();
  return 0;
}
EXPORT void replay() {
  for (const auto& launch : graph) launch();
}
EXPORT void forget_graph() { graph.clear(); }
// Whether a division by multiplication and shift is one, around every multiple and at the ends.
EXPORT bool divides(int value) {
  nslightning::Divisor<int> by;
  nslightning::divide_by(value, by);
  const long long most = 0x7FFFFFFF, step = std::max<long long>(1, most / value / 1000) * value;
  for (long long multiple = 0; multiple <= most; multiple += step) {
    for (long long n = std::max<long long>(0, multiple - 2); n <= std::min(most, multiple + 2); ++n) {
      if (nslightning::operator/(static_cast<int>(n), by) != n / value) return false;
    }
  }
  return nslightning::operator/(static_cast<int>(most), by) == most / value;
}
// So that a test can make another context the current one.
EXPORT void use_other_context() { current = &other_context; }
EXPORT bool other_context_is_current() { return current == &other_context; }
EXPORT void use_no_context() { current = nullptr; }
