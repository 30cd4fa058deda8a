// What nodes.cpp hands to the kernels of cuda.cu with each launch, by value.
//
// Read by three compilers: the host's, NVRTC for a device, and the host's again where a test runs the kernels on a CPU.

#ifndef NSLIGHTNING_ARGUMENTS
#define NSLIGHTNING_ARGUMENTS

namespace nslightning {

constexpr int BLOCK = 256;  // threads of a block
constexpr int GROUP = 8;    // entries of a pointwise operation that one thread takes: a byte of ties

// Where entries count as ties, and the derivatives there; a position that is NaN counts none. Where `slope` is a number,
// the derivative is 1 above `low` and `slope` elsewhere. Where it is NaN, the derivative is 1 between the bounds, and the
// gradient is 0 elsewhere.
template <typename W>
struct Linear {
  W position[2], derivative[2], low, high, slope;
};

// Whether a chosen derivative leaves a kink to stock's arithmetic: NaN stands for the reference. `constant` is the
// published rule, which drops the incoming gradient.
inline bool as_stock(double derivative, double reference, bool constant) {
  return derivative != derivative || (derivative == reference && (derivative == 0 || !constant));
}

// Where a launch that is captured in a CUDA graph reads the choice when it is replayed: in the device's memory of the
// selection. A launch that runs now carries the choice itself, and has no such memory.
struct Later {
  const double* memory;    // the derivatives at the kinks, or null
  const bool* published;   // whether the published rule is in force; null where an operation has none of its own
  double reference[2];     // stock's derivatives
  int kinks;

  bool constant() const { return published && *published; }

  // All kinks' positions count as ties beforehand.
  template <typename W>
  void settle(Linear<W>& how, bool& rule) const {
    if (!memory) return;
    const W zero = 0, absent = zero / zero;  // NaN, which no entry equals
    rule = constant();
    for (int i = 0; i < kinks; ++i) {
      how.derivative[i] = static_cast<W>(memory[i]);
      if (as_stock(memory[i], reference[i], rule)) how.position[i] = absent;
    }
  }

  // Of ReLU: stock writes 0 at 0.
  template <typename W>
  void settle(W& derivative, bool& rule) const {
    if (!memory) return;
    rule = constant();
    const bool stock = as_stock(memory[0], reference[0], rule);
    derivative = stock ? 0 : static_cast<W>(memory[0]);
    rule = rule || stock;
  }
};

// How a window with k > 1 tied entries shares its gradient g: each receives g * (share / k + each), and the target
// g * whole more.
template <typename W>
struct Shares {
  W share, whole, each;
  bool last;             // whether the target is the last tied entry, else the first
  bool apart;            // whether what the targets receive is summed up apart
  bool vertex;           // whether the target receives all
  bool disjoint;         // whether no two windows overlap
  const double* memory;  // where a captured launch reads the weights, as in Later
};

// By the weights of a selection's memory: share, whole, each, last.
template <typename W>
Shares<W> shares_of(const double* weights, bool disjoint) {
  const bool vertex = weights[0] == 0 && weights[1] == 1 && weights[2] == 0;
  const bool apart = !(disjoint || vertex || weights[1] == 0);
  return {static_cast<W>(weights[0]), static_cast<W>(weights[1]), static_cast<W>(weights[2]), weights[3] != 0, apart,
          vertex, disjoint, nullptr};
}

// A number to divide by. Where indices have 32 bits, a multiplication and a shift divide: n / value is
// (high word of n * factor + n) >> shift for every n from 0 to 2^31 - 1.
template <typename I>
struct Divisor;

template <>
struct Divisor<int> {
  int value;
  unsigned factor, shift;
};

template <>
struct Divisor<long long> {
  long long value;
};

inline void divide_by(long long value, Divisor<int>& into) {
  constexpr unsigned long long one = 1;
  unsigned shift = 0;
  while ((one << shift) < static_cast<unsigned long long>(value)) ++shift;
  const unsigned long long factor = (one << 32) * ((one << shift) - value) / value + 1;
  into = {static_cast<int>(value), static_cast<unsigned>(factor), shift};
}

inline void divide_by(long long value, Divisor<long long>& into) { into = {value}; }

// Images of channels x height x width entries, and of channels x rows x columns windows.
template <typename I>
struct Geometry {
  Divisor<I> channels, height, width, rows, columns, stride[2], dilation[2];
  I kernel[2], padding[2];
  bool last;  // whether the channels come last in memory
};

}  // namespace nslightning

#endif
