// Autograd nodes of the operations that networks call most: ReLU, ReLU6, LeakyReLU, Hardtanh, clamp, Hardswish,
// Hardsigmoid and 2-d max pooling.
//
// A Python autograd function costs the host several times what the stock operation costs. These nodes cost as much as
// stock's. They read the choice when the backward runs, from the memory of the tensors that a Selection fills in place.
// What they do not take (transforms, modes, other layouts, random choices, second derivatives) goes the Python way, from
// the same saved tensors and with the same bits.
//
// Built by build.py for one version of PyTorch. The loops over the memory are cpu.cpp's, whose addresses native.py
// hands over: they need no header of PyTorch's. On a CUDA device they are cuda.cu's, launched by NVIDIA's driver on
// PyTorch's current stream. There no value is looked at and nothing is waited for.

#define PY_SSIZE_T_CLEAN
#include "arguments.h"

#include <ATen/TensorIterator.h>
#include <ATen/Parallel.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardsigmoid_backward.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/le.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/custom_class.h>

#include <dlfcn.h>
#include <structmember.h>

#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <typeinfo>

// As in ATen/functorch/DynamicLayer.h, which needs a header that PyTorch does not install.
namespace at::functorch {
struct DynamicLayer;
TORCH_API const std::vector<DynamicLayer>& getDynamicLayerStack();
}  // namespace at::functorch

namespace nslightning {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ------------------------------------------------------------------------------------------------------------ kernels

enum Op : int { RELU, RELU6, LEAKY_RELU, HARDTANH, CLAMP, HARDSWISH, HARDSIGMOID, MAX_POOL, OPS };

const char* const NAMES[OPS] = {"relu", "relu6", "leaky_relu", "hardtanh", "clamp", "hardswish", "hardsigmoid",
                                "max_pool"};

// Functions of cpu.cpp for one dtype.
struct Kernels {
  bool (*any_equal)(const void*, int64_t, double, double, int64_t);
  void (*relu_forward)(const void*, void*, uint8_t*, int64_t, int64_t);
  void (*relu_backward)(const void*, const void*, const uint8_t*, void*, int64_t, double, bool, int64_t);
  bool (*linear_backward)(const void*, const void*, void*, int64_t, const double*, bool, int64_t);
  void (*replace)(const void*, const void*, void*, int64_t, const double*, int64_t);
  bool (*pool_forward)(const void*, void*, int16_t*, const int64_t*, bool, int64_t);
  void (*pool_backward)(const void*, const int16_t*, const void*, void*, const int64_t*, bool, bool, bool, int64_t);
};

constexpr double ABSENT = std::numeric_limits<double>::quiet_NaN();  // no entry equals it

constexpr int DTYPES = 4;
Kernels kernels[DTYPES];
const at::ScalarType dtypes[DTYPES] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
const char* const dtype_names[DTYPES] = {"float32", "float64", "bfloat16", "float16"};

int dtype_of(const Tensor& x) {
  for (int i = 0; i < DTYPES; ++i) {
    if (x.scalar_type() == dtypes[i]) return i;
  }
  return -1;
}

const Kernels* kernels_of(const Tensor& x) {
  const int dtype = dtype_of(x);
  return dtype >= 0 && kernels[dtype].any_equal ? &kernels[dtype] : nullptr;
}

// ------------------------------------------------------------------------------------------------------- CUDA devices

enum DeviceKernel : int {
  RELU_FORWARD, RELU_BACKWARD, LINEAR_BACKWARD, REPLACE, POOL_FORWARD, POOL_BACKWARD, POOL_FORWARD_WIDE,
  POOL_BACKWARD_WIDE, DEVICE_KERNELS
};

const char* const DEVICE_KERNEL_NAMES[DEVICE_KERNELS] = {
    "relu_forward", "relu_backward", "linear_backward", "replace",
    "pool_forward", "pool_backward", "pool_forward_wide", "pool_backward_wide"};

// The functions of NVIDIA's driver that are called here, as cuda.h declares them; a result other than 0 is an error.
struct Driver {
  int (*cuInit)(unsigned);
  int (*cuDeviceGet)(int*, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuCtxGetCurrent)(void**);
  int (*cuCtxSetCurrent)(void*);
  int (*cuModuleLoadData)(void**, const void*);
  int (*cuModuleGetFunction)(void**, void*, const char*);
  int (*cuGetErrorString)(int, const char**);
  int (*cuStreamIsCapturing)(void*, int*);
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                        void**);

  explicit Driver(const char* library) {
    void* opened = dlopen(library, RTLD_NOW);
    TORCH_CHECK(opened, "NVIDIA's driver cannot be loaded: ", dlerror());
    const auto find = [&](const char* name, auto& into) {
      into = reinterpret_cast<std::decay_t<decltype(into)>>(dlsym(opened, name));
      TORCH_CHECK(into, library, " has no function ", name);
    };
    find("cuInit", cuInit);
    find("cuDeviceGet", cuDeviceGet);
    find("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain);
    find("cuCtxGetCurrent", cuCtxGetCurrent);
    find("cuCtxSetCurrent", cuCtxSetCurrent);
    find("cuModuleLoadData", cuModuleLoadData);
    find("cuModuleGetFunction", cuModuleGetFunction);
    find("cuGetErrorString", cuGetErrorString);
    find("cuStreamIsCapturing", cuStreamIsCapturing);
    find("cuLaunchKernel", cuLaunchKernel);
  }

  void check(int result, const char* call) const {
    if (result == 0) return;
    const char* text = nullptr;
    cuGetErrorString(result, &text);
    TORCH_CHECK(false, call, ": ", text ? text : "unknown error", " (", result, ")");
  }
};

// Makes a device's context the current one: PyTorch may not have touched the device in this thread.
struct InContext {
  const Driver& driver;
  void *context, *before = nullptr;

  InContext(const Driver& driver, void* context) : driver(driver), context(context) {
    driver.check(driver.cuCtxGetCurrent(&before), "cuCtxGetCurrent");
    if (before != context) driver.check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent");
  }
  ~InContext() {
    if (before && before != context) driver.cuCtxSetCurrent(before);
  }
};

// A device and its kernels. It is never freed, since graphs may be replayed when the interpreter goes away.
struct Device {
  Driver driver;
  void* context = nullptr;
  void* functions[DEVICE_KERNELS][DTYPES] = {};

  Device(const char* library, int index, const void* image) : driver(library) {
    int device;
    driver.check(driver.cuInit(0), "cuInit");
    driver.check(driver.cuDeviceGet(&device, index), "cuDeviceGet");
    driver.check(driver.cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    const InContext current(driver, context);
    void* module;
    driver.check(driver.cuModuleLoadData(&module, image), "cuModuleLoadData");
    for (int kernel = 0; kernel < DEVICE_KERNELS; ++kernel) {
      for (int dtype = 0; dtype < DTYPES; ++dtype) {
        const std::string name = std::string(DEVICE_KERNEL_NAMES[kernel]) + "_" + dtype_names[dtype];
        driver.check(driver.cuModuleGetFunction(&functions[kernel][dtype], module, name.c_str()), name.c_str());
      }
    }
  }
};

constexpr int DEVICES = 64;
std::array<std::atomic<const Device*>, DEVICES> devices{};
std::array<std::atomic<bool>, DEVICES> asked{};  // whether native.py was asked to connect them
std::atomic<bool> host_is_device{false};         // CPU tensors take the way of CUDA tensors: for a test without a GPU

// The device whose kernels work on a tensor; null on a CPU, and where the kernels are not loaded.
const Device* gpu_of(const Tensor& x) {
  if (x.is_cuda()) return x.get_device() < DEVICES ? devices[x.get_device()].load() : nullptr;
  return host_is_device && x.device().is_cpu() ? devices[0].load() : nullptr;
}

// The handle that the driver takes of a stream of PyTorch's.
template <typename Stream>
void* handle_of(const Stream& stream) {
  if constexpr (requires { stream.native_handle(); }) {
    return stream.native_handle();
  } else {  // of an older PyTorch, where a CUDAStream is its only member, a Stream
    using Handle = void* (*)(const Stream*);
    static const auto handle = [] {
      void* library = dlopen("libc10_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return reinterpret_cast<Handle>(library ? dlsym(library, "_ZNK3c104cuda10CUDAStream6streamEv") : nullptr);
    }();
    TORCH_CHECK(handle, "this PyTorch does not tell the handle of a stream");
    return handle(&stream);
  }
}

void* stream_of(const Tensor& x) {
  if (!x.is_cuda()) return nullptr;
  return handle_of(c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()));
}

// Whether what a stream is given now is captured in a CUDA graph, to run when that is replayed.
bool captured(const Tensor& x) {
  const Device& device = *gpu_of(x);
  int status = 0;
  const InContext current(device.driver, device.context);
  device.driver.check(device.driver.cuStreamIsCapturing(stream_of(x), &status), "cuStreamIsCapturing");
  return status != 0;
}

// Start a kernel on so many threads, on the current stream. The arguments have the types of the kernel's parameters.
template <typename... Arguments>
void launch(const Tensor& x, DeviceKernel kernel, int64_t threads, Arguments... arguments) {
  if (threads == 0) return;
  const Device& device = *gpu_of(x);
  void* pointers[] = {&arguments...};
  const auto blocks = (threads + BLOCK - 1) / BLOCK;
  TORCH_CHECK(blocks < (int64_t{1} << 31), "a tensor of ", x.numel(), " entries is too large for one launch");
  const InContext current(device.driver, device.context);
  device.driver.check(
      device.driver.cuLaunchKernel(device.functions[kernel][dtype_of(x)], static_cast<unsigned>(blocks), 1, 1, BLOCK, 1,
                                   1, 0, stream_of(x), pointers, nullptr),
      DEVICE_KERNEL_NAMES[kernel]);
}

int64_t groups(const Tensor& x) { return (x.numel() + GROUP - 1) / GROUP; }

// Call work(number of the dtype that a tensor's arithmetic is done in).
template <typename Work>
void in_wide(const Tensor& x, Work work) {
  if (x.scalar_type() == at::kDouble) work(double());
  else work(float());
}

// A number as an entry of the tensor has it.
double as_entry(const Tensor& x, double value) {
  switch (x.scalar_type()) {
    case at::kHalf: return static_cast<float>(at::Half(static_cast<float>(value)));
    case at::kBFloat16: return static_cast<float>(at::BFloat16(static_cast<float>(value)));
    default: return value;
  }
}

// `how` as the kernels of cpu.cpp take it.
template <typename W>
Linear<W> linear(const Tensor& x, const double* how) {
  const auto wide = [](double value) { return static_cast<W>(value); };
  return {{wide(as_entry(x, how[0])), wide(as_entry(x, how[1]))}, {wide(how[2]), wide(how[3])}, wide(how[4]),
          wide(how[5]), wide(how[6])};
}

// A pooling's geometry as the kernels of cpu.cpp take it, for those of cuda.cu.
template <typename I>
Geometry<I> windows(const int64_t* at) {
  Geometry<I> of;
  divide_by(at[1], of.channels), divide_by(at[2], of.height), divide_by(at[3], of.width);
  divide_by(at[4], of.rows), divide_by(at[5], of.columns);
  for (int i = 0; i < 2; ++i) {
    divide_by(at[8 + i], of.stride[i]), divide_by(at[12 + i], of.dilation[i]);
    of.kernel[i] = static_cast<I>(at[6 + i]), of.padding[i] = static_cast<I>(at[10 + i]);
  }
  of.last = at[14] != 0;
  return of;
}

int64_t narrow_limit = (int64_t{1} << 31) - (1 << 16);  // entries that 32 bits count, with room for the last block

// Start a pooling's kernel on one thread per entry of `result`.
template <typename... Arguments>
void launch_pool(const Tensor& result, const Tensor& input, DeviceKernel kernel, const int64_t* at, const void* from,
                 void* or_masks, void* into, Arguments... arguments) {
  const auto n = static_cast<long long>(result.numel());
  const bool wide = std::max(result.numel(), input.numel()) > narrow_limit;
  if (wide) {
    launch(input, static_cast<DeviceKernel>(kernel + 2), n, from, or_masks, into, n, windows<long long>(at),
           arguments...);
  } else {
    launch(input, kernel, n, from, or_masks, into, n, windows<int>(at), arguments...);
  }
}

// ------------------------------------------------------------------------------------------------------- the choice

// The memory of a Selection's tensors. NaN stands for the reference, infinity for a random choice.
struct Numbers {
  const double* kinks[MAX_POOL];
  const double* pool;  // share, whole, each, last
  const bool* published;
  std::vector<Tensor> kept;

  // `kinks` is a tuple of tensors, in the order of NAMES.
  Numbers(PyObject* of_kinks, PyObject* of_pool, PyObject* of_rule) {
    TORCH_CHECK(PyTuple_Check(of_kinks) && PyTuple_GET_SIZE(of_kinks) == MAX_POOL, "the kinks of ", int(MAX_POOL),
                " operations are wanted");
    for (int op = 0; op < MAX_POOL; ++op) {
      kinks[op] = static_cast<const double*>(memory(PyTuple_GET_ITEM(of_kinks, op), at::kDouble));
    }
    pool = static_cast<const double*>(memory(of_pool, at::kDouble));
    published = static_cast<const bool*>(memory(of_rule, at::kBool));
  }

  const void* memory(PyObject* object, at::ScalarType dtype) {
    const Tensor tensor = THPVariable_Unpack(object);
    TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous());
    kept.push_back(tensor);
    return tensor.const_data_ptr();
  }
};

struct Choice : Numbers {
  const bool* watched;  // by a recorder of backwards, by an observer of forwards
  bool fixed;           // whether it never changes
  // The same numbers in the memory of devices, for what is captured there; made once and kept as long as this.
  mutable std::array<std::atomic<const Numbers*>, DEVICES> on_device{};

  Choice(PyObject* kinks, PyObject* pool, PyObject* rule, PyObject* of_watched, bool fixed)
      : Numbers(kinks, pool, rule), watched(static_cast<const bool*>(memory(of_watched, at::kBool))), fixed(fixed) {}
  ~Choice() {
    for (auto& numbers : on_device) delete numbers.load();
  }

  bool recorded() const { return watched[0]; }
  bool observed() const { return watched[1]; }
};

int index_of(const Tensor& x) { return x.is_cuda() ? x.get_device() : 0; }

struct GIL {
  PyGILState_STATE state = PyGILState_Ensure();
  ~GIL() { PyGILState_Release(state); }
};

struct NoGIL {
  PyThreadState* state = PyEval_SaveThread();
  ~NoGIL() { PyEval_RestoreThread(state); }
};

// One evaluation of an operation, as its backward node keeps it.
struct Call : torch::CustomClassHolder {
  Op op;
  std::shared_ptr<const Choice> choice;
  PyObject* selection;  // the Selection that `choice` is the memory of
  double parameters[2] = {0, 0};
  int64_t geometry[15] = {};
  bool inplace = false, ceil_mode = false, tied = true;

  Call(Op op, std::shared_ptr<const Choice> choice, PyObject* selection)
      : op(op), choice(std::move(choice)), selection(Py_NewRef(selection)) {}
  ~Call() override {
    if (!Py_IsInitialized()) return;
    GIL gil;
    Py_DECREF(selection);
  }
};

using CallPtr = c10::intrusive_ptr<Call>;

PyObject* python = nullptr;  // nslightning.ops.autograd.native

// ------------------------------------------------------------------------------------------- what the nodes take

// Whether nothing but autograd stands between a call and its kernel: no transform, mode or trace.
bool plain_thread() {
  return !c10::impl::dispatch_mode_enabled() && at::functorch::getDynamicLayerStack().empty() &&
         !torch::jit::tracer::isTracing();
}

// Whether a tensor is numbers in memory, each in a place of its own, on a CPU or a device whose kernels are loaded.
bool plain(const Tensor& x) {
  static const auto allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU,
                           c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutogradFunctionality});
  static const auto allowed_on_cuda =
      c10::DispatchKeySet({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCUDA,
                           c10::DispatchKey::AutocastCUDA, c10::DispatchKey::AutogradFunctionality});
  if (!x.defined() || x.layout() != at::kStrided || !kernels_of(x)) return false;
  if (x.is_cuda() && !gpu_of(x)) return false;
  const auto& keys = x.is_cuda() ? allowed_on_cuda : allowed;
  return (x.key_set().raw_repr() & ~keys.raw_repr()) == 0 && x.is_non_overlapping_and_dense();
}

bool differentiated(const Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

// ------------------------------------------------------------------------------------------- memory as stock has it

// What a stock operation of one operand allocates for its result.
Tensor like(const Tensor& x) {
  if (x.is_contiguous()) return at::empty(x.sizes(), x.options());
  if (x.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  }
  return at::empty_strided(x.sizes(), x.strides(), x.options());
}

// What a stock operation of two operands of one shape and dtype allocates for its result.
Tensor like(const Tensor& first, const Tensor& second) {
  if (first.strides() == second.strides()) return like(first);
  auto iterator = at::TensorIteratorConfig()
                      .set_check_mem_overlap(false)
                      .add_owned_output(Tensor())
                      .add_owned_const_input(first)
                      .add_owned_const_input(second)
                      .build();
  return iterator.output();
}

// Whether two tensors of one shape have their entries in the same order in memory.
bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// The same values in the memory order of another tensor of the same shape, which is dense.
Tensor laid_out_as(const Tensor& x, const Tensor& other) {
  if (same_order(x, other)) return x;
  return at::empty_strided(other.sizes(), other.strides(), x.options()).copy_(x);
}

// Fill a gradient that stock would allocate as `result`, by a kernel that writes in the order of `saved`.
template <typename Kernel>
Tensor filled(Tensor result, const Tensor& saved, Kernel kernel) {
  if (same_order(result, saved)) {
    kernel(result.data_ptr());
    return result;
  }
  Tensor ordered = at::empty_strided(saved.sizes(), saved.strides(), result.options());
  kernel(ordered.data_ptr());
  return result.copy_(ordered);
}

// ---------------------------------------------------------------------------------------------------- the operations

// Where an operation kinks, and what stock returns there.
struct Kink {
  double position, reference;
};

double at_lower = 0, at_upper = 0;  // stock's derivatives of clamp at its bounds, which depend on the version
const std::type_info* stock_relu = &typeid(void);  // the class of the nodes of stock's ReLU

void kinks_of(const Call& call, Kink (&kinks)[2]) {
  const double *p = call.parameters;
  switch (call.op) {
    case RELU6: kinks[0] = {0, 0}, kinks[1] = {6, 0}; return;
    case LEAKY_RELU: kinks[0] = {0, p[0]}, kinks[1] = {ABSENT, 0}; return;
    case HARDTANH: kinks[0] = {p[0], 0}, kinks[1] = {p[1], 0}; return;
    case CLAMP:  // constant where the interval is empty or a point
      if (p[0] >= p[1]) kinks[0] = {ABSENT, 0}, kinks[1] = {ABSENT, 0};
      else kinks[0] = {p[0], at_lower}, kinks[1] = {p[1], at_upper};
      return;
    case HARDSWISH: kinks[0] = {-3, 0}, kinks[1] = {3, 1}; return;
    case HARDSIGMOID: kinks[0] = {-3, 0}, kinks[1] = {3, 0}; return;
    default: kinks[0] = {0, 0}, kinks[1] = {ABSENT, 0}; return;
  }
}

std::optional<at::Scalar> bound(double value) {
  return std::isnan(value) ? std::nullopt : std::optional<at::Scalar>(value);
}

Tensor stock_forward(const Call& call, const Tensor& x) {
  const double* p = call.parameters;
  switch (call.op) {
    case RELU: return at::relu(x);
    case RELU6: return at::hardtanh(x, 0, 6);
    case LEAKY_RELU: return at::leaky_relu(x, p[0]);
    case HARDTANH: return at::hardtanh(x, p[0], p[1]);
    case CLAMP: return at::clamp(x, bound(p[0]), bound(p[1]));
    case HARDSWISH: return at::hardswish(x);
    default: return at::hardsigmoid(x);
  }
}

Tensor stock_forward_(const Call& call, Tensor x) {
  const double* p = call.parameters;
  switch (call.op) {
    case RELU: return at::relu_(x);
    case RELU6: return at::hardtanh_(x, 0, 6);
    case LEAKY_RELU: return at::leaky_relu_(x, p[0]);
    case HARDTANH: return at::hardtanh_(x, p[0], p[1]);
    case CLAMP: return at::clamp_(x, bound(p[0]), bound(p[1]));
    case HARDSWISH: return at::hardswish_(x);
    default: return at::hardsigmoid_(x);
  }
}

// A node keeps its call in a hook that does nothing, and where the call lies as a number: compiled autograd takes
// numbers among what a node saves, and no objects.
struct Keeper : torch::autograd::FunctionPreHook {
  CallPtr call;

  explicit Keeper(CallPtr call) : call(std::move(call)) {}
  variable_list operator()(const variable_list& incoming) override { return incoming; }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {}
};

const Call& call_of(AutogradContext* ctx) {
  return *reinterpret_cast<const Call*>(ctx->saved_data.at("call").toInt());
}

PyObject* wrapped(const Tensor& tensor) {
  return tensor.defined() ? THPVariable_Wrap(tensor) : Py_NewRef(Py_None);
}

// Call a function of native.py with the operation, its parameters, its selection, its saved tensors and a gradient.
THPObjectPtr ask_python(const char* function, const Call& call, const variable_list& saved, const Tensor& g,
                        PyObject* node) {
  THPObjectPtr parameters(PyTuple_New(call.op == MAX_POOL ? 9 : 2));
  if (!parameters) throw python_error();
  if (call.op == MAX_POOL) {
    for (int i = 0; i < 8; ++i) PyTuple_SET_ITEM(parameters.get(), i, PyLong_FromLongLong(call.geometry[6 + i]));
    PyTuple_SET_ITEM(parameters.get(), 8, PyBool_FromLong(call.ceil_mode));
  } else {
    for (int i = 0; i < 2; ++i) PyTuple_SET_ITEM(parameters.get(), i, PyFloat_FromDouble(call.parameters[i]));
  }
  THPObjectPtr tensors(PyTuple_New(static_cast<Py_ssize_t>(saved.size())));
  if (!tensors) throw python_error();
  for (size_t i = 0; i < saved.size(); ++i) PyTuple_SET_ITEM(tensors.get(), i, wrapped(saved[i]));
  THPObjectPtr incoming(wrapped(g));
  THPObjectPtr result(PyObject_CallMethod(python, function, "sOOOOO", NAMES[call.op], parameters.get(), call.selection,
                                          tensors.get(), incoming.get(), node));
  if (!result) throw python_error();
  return result;
}

// The gradient composed of PyTorch's operations.
Tensor composed(const Call& call, const variable_list& saved, const Tensor& g) {
  GIL gil;
  THPObjectPtr result = ask_python("_composed", call, saved, g, Py_None);
  return THPVariable_Unpack(result.get());
}

// Whether a kernel of ours may work on a gradient: it is numbers in memory where those are that the node saved, and will
// not be differentiated again.
bool final(const Tensor& g, const Tensor& saved) {
  return !at::GradMode::is_enabled() && plain_thread() && kernels_of(g) && g.layout() == at::kStrided &&
         !g.is_neg() && !g._is_zerotensor() && g.device() == saved.device() &&
         !g.key_set().has(c10::DispatchKey::Python) && !g.key_set().has(c10::DispatchKey::FuncTorchBatched) &&
         !g.key_set().has(c10::DispatchKey::Batched) && !g.key_set().has(c10::DispatchKey::Functionalize);
}

// Tell the recorder of the selection, if there is one, what this backward meets.
void record(const Call& call, const variable_list& saved, const Tensor& g) {
  if (!call.choice->recorded() || !call.tied) return;
  GIL gil;
  THPObjectPtr node(torch::autograd::functionToPyObject(torch::autograd::get_current_node()));
  ask_python("_record", call, saved, g, node.get());
}

// The memory where a launch reads the choice when it is replayed; null for a launch that runs now.
const Numbers* when_replayed(const Call& call, const Tensor& x) {
  const auto& choice = call.choice;
  if (!gpu_of(x) || choice->fixed || !captured(x)) return nullptr;
  const Numbers* numbers = choice->on_device[index_of(x)];
  TORCH_CHECK(numbers, "a captured step reads the Jacobian choice from the device's memory, which an ordinary step makes "
                       "there: run one step before the capture");
  // A graph may be replayed when the model is gone.
  static auto& kept = *new std::set<std::shared_ptr<const Choice>>();
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  kept.insert(choice);
  return numbers;
}

Later later(const Numbers* numbers, Op op, bool has_rule, double first, double second = 0) {
  if (!numbers) return {};
  return {numbers->kinks[op], has_rule ? numbers->published : nullptr, {first, second},
          op == RELU || op == LEAKY_RELU ? 1 : 2};
}

Tensor relu_gradient(const Call& call, const variable_list& saved, const Tensor& g) {
  const double alpha = call.choice->kinks[RELU][0];
  const bool constant = *call.choice->published;
  const Tensor &y = saved[0], &bits = saved[1];
  const Numbers* replayed = when_replayed(call, y);
  if (!replayed && as_stock(alpha, 0, constant)) return at::threshold_backward(g, y, 0);
  if (std::isinf(alpha) || !final(g, y)) return composed(call, saved, g);
  return filled(like(y, g), y, [&](void* into) {
    const Tensor incoming = laid_out_as(g, y);
    if (gpu_of(y)) {
      return in_wide(y, [&](auto wide) {
        launch(y, RELU_BACKWARD, groups(y), incoming.const_data_ptr(), y.const_data_ptr(), bits.const_data_ptr(), into,
               static_cast<long long>(y.numel()), static_cast<decltype(wide)>(alpha), constant,
               later(replayed, RELU, true, 0));
      });
    }
    kernels_of(y)->relu_backward(incoming.const_data_ptr(), y.const_data_ptr(), bits.const_data_ptr<uint8_t>(), into,
                                 y.numel(), alpha, constant, at::get_num_threads());
  });
}

// Stock's backward of clamp, which is no operator.
Tensor clamp_backward(const Tensor& g, const Tensor& x, const double* bounds) {
  Tensor inside;
  if (!std::isnan(bounds[0])) inside = at_lower ? at::ge(x, bounds[0]) : at::gt(x, bounds[0]);
  if (!std::isnan(bounds[1])) {
    const Tensor below = at_upper ? at::le(x, bounds[1]) : at::lt(x, bounds[1]);
    inside = inside.defined() ? inside.logical_and_(below) : below;
  }
  return at::where(inside, g, at::scalar_tensor(0, g.options()));
}

Tensor stock_backward(const Call& call, const Tensor& g, const Tensor& x) {
  const double* p = call.parameters;
  switch (call.op) {
    case RELU6: return at::hardtanh_backward(g, x, 0, 6);
    case LEAKY_RELU: return at::leaky_relu_backward(g, x, p[0], false);
    case HARDTANH: return at::hardtanh_backward(g, x, p[0], p[1]);
    case CLAMP: return clamp_backward(g, x, p);
    case HARDSWISH: return at::hardswish_backward(g, x);
    default: return at::hardsigmoid_backward(g, x);
  }
}

Tensor pointwise_gradient(const Call& call, const variable_list& saved, const Tensor& g) {
  const Tensor& x = saved[0];
  const double* chosen = call.choice->kinks[call.op];
  const bool constant = call.op == RELU6 && *call.choice->published;
  const Numbers* replayed = when_replayed(call, x);
  Kink kinks[2];
  kinks_of(call, kinks);
  // As the kernels take it: the positions that count as ties, the derivatives there; the bounds, the slope outside.
  double how[7] = {ABSENT, ABSENT, 0, 0, ABSENT, ABSENT, 0};
  for (int i = 0; i < 2; ++i) {
    const double derivative = std::isnan(kinks[i].position) ? ABSENT : chosen[i];
    if (std::isinf(derivative)) return composed(call, saved, g);
    if (replayed || !as_stock(derivative, kinks[i].reference, constant)) {
      how[i] = kinks[i].position, how[2 + i] = derivative;
    }
  }
  const Later late = later(replayed, call.op, call.op == RELU6, kinks[0].reference, kinks[1].reference);
  if (!final(g, x)) return composed(call, saved, g);
  const auto* kernel = kernels_of(x);
  const bool on_device = gpu_of(x);
  const auto n = static_cast<long long>(x.numel());
  const int64_t threads = at::get_num_threads();
  if (call.op == RELU6 || call.op == HARDTANH || call.op == LEAKY_RELU) {
    const bool leaky = call.op == LEAKY_RELU, unit = call.op == RELU6;
    how[4] = leaky || unit ? 0 : call.parameters[0];
    how[5] = leaky ? ABSENT : unit ? 6 : call.parameters[1];
    how[6] = leaky ? call.parameters[0] : ABSENT;
    const Tensor incoming = laid_out_as(g, x);
    bool nan = false;
    const Tensor gradient = filled(leaky ? like(x, g) : like(g, x), x, [&](void* into) {
      if (on_device) {
        return in_wide(x, [&](auto wide) {
          launch(x, LINEAR_BACKWARD, groups(x), incoming.const_data_ptr(), x.const_data_ptr(), into, n,
                 linear<decltype(wide)>(x, how), constant, late);
        });
      }
      nan = kernel->linear_backward(incoming.const_data_ptr(), x.const_data_ptr(), into, x.numel(), how, constant,
                                    threads);
    });
    if (!nan) return gradient;
    if (constant) return composed(call, saved, g);
  }
  const Tensor gradient = stock_backward(call, g, x);
  if (std::isnan(how[0]) && std::isnan(how[1])) return gradient;
  const Tensor at = laid_out_as(x, gradient), incoming = laid_out_as(g, gradient);
  if (on_device) {
    in_wide(x, [&](auto wide) {
      launch(x, REPLACE, groups(x), incoming.const_data_ptr(), at.const_data_ptr(), gradient.data_ptr(), n,
             linear<decltype(wide)>(x, how), late);
    });
  } else {
    kernel->replace(incoming.const_data_ptr(), at.const_data_ptr(), gradient.data_ptr(), x.numel(), how, threads);
  }
  return gradient;
}

constexpr int64_t AT_ONCE = 12;  // as in windows.py
constexpr int COUNTS = 17;  // a window's tied entries are 0 to 16

// What an entry, and what the target, of a window with so many tied entries receives: pool_coefficients of selection.py.
template <typename T>
void pool_table(const double* weights, bool apart, T (&table)[2 * COUNTS]) {
  for (int k = 0; k < COUNTS; ++k) {
    const T rest = static_cast<T>(weights[0]) / static_cast<T>(std::max(k, 1)) + static_cast<T>(weights[2]);
    table[k] = k < 2 ? T(apart ? 0 : 1) : rest;
    table[COUNTS + k] = k < 2 ? T(1) : apart ? static_cast<T>(weights[1]) : rest + static_cast<T>(weights[1]);
  }
}

bool disjoint(const int64_t* geometry) {
  const int64_t *kernel = geometry + 6, *stride = geometry + 8, *dilation = geometry + 12;
  return stride[0] > dilation[0] * (kernel[0] - 1) && stride[1] > dilation[1] * (kernel[1] - 1);
}

Tensor pool_gradient(const Call& call, const variable_list& saved, const Tensor& g) {
  const Tensor &x = saved[0], &masks = saved[1];
  const double* weights = call.choice->pool;
  if (std::isinf(weights[0]) || !final(g, x)) return composed(call, saved, g);
  const Numbers* replayed = when_replayed(call, x);
  const Tensor gradient = at::empty(x.sizes(), x.options().memory_format(x.suggest_memory_format()));
  const Tensor incoming = laid_out_as(g, masks);
  if (gpu_of(x)) {
    in_wide(x, [&](auto wide) {
      auto shares = shares_of<decltype(wide)>(weights, disjoint(call.geometry));
      shares.memory = replayed ? replayed->pool : nullptr;
      launch_pool(gradient, x, POOL_BACKWARD, call.geometry, incoming.const_data_ptr(),
                  const_cast<void*>(masks.const_data_ptr()), gradient.data_ptr(), shares);
    });
    return gradient;
  }
  auto shares = shares_of<double>(weights, disjoint(call.geometry));
  shares.apart |= x.element_size() == 2 && !shares.disjoint && !shares.vertex;  // stock's sums are rounded one by one
  const auto fill = [&](const void* table) {
    kernels_of(x)->pool_backward(incoming.const_data_ptr(), masks.const_data_ptr<int16_t>(), table,
                                 gradient.data_ptr(), call.geometry, shares.last, shares.apart, shares.vertex,
                                 at::get_num_threads());
  };
  if (x.scalar_type() == at::kDouble) {
    double table[2 * COUNTS];
    pool_table(weights, shares.apart, table);
    fill(table);
  } else {
    float table[2 * COUNTS];
    pool_table(weights, shares.apart, table);
    fill(table);
  }
  return gradient;
}

Tensor gradient_of(const Call& call, const variable_list& saved, const Tensor& g) {
  if (call.op == MAX_POOL) return pool_gradient(call, saved, g);
  return call.op == RELU ? relu_gradient(call, saved, g) : pointwise_gradient(call, saved, g);
}

// What a backward works on. Behind it a LeakyReLU in place keeps its result, as stock, only to refuse a backward after that
// has changed.
variable_list saved_by(AutogradContext* ctx, const Call& call) {
  variable_list saved = ctx->get_saved_variables();
  if (call.op == LEAKY_RELU) saved.resize(1);
  return saved;
}

// What the three nodes below share: their names tell them apart in a graph.
template <typename Node>
struct Nonsmooth : torch::autograd::Function<Node> {
  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    if (!incoming[0].defined()) return {Tensor(), Tensor(), Tensor()};
    const Call& call = call_of(ctx);
    const variable_list saved = saved_by(ctx, call);
    record(call, saved, incoming[0]);
    return {gradient_of(call, saved, incoming[0]), Tensor(), Tensor()};
  }

  static void keep(AutogradContext* ctx, const CallPtr& call, variable_list tensors) {
    ctx->saved_data["call"] = static_cast<int64_t>(reinterpret_cast<intptr_t>(call.get()));
    ctx->save_for_backward(std::move(tensors));
    ctx->set_materialize_grads(false);
  }
};

// Keeps the output, as stock, and one bit per entry.
struct ReLU : Nonsmooth<ReLU> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const CallPtr& call) {
    const auto* kernel = kernels_of(x);
    const bool on_device = gpu_of(x);
    // On a CPU the output of half precisions is stock's, written after the ties are known.
    const bool half = x.element_size() == 2 && !on_device;
    Tensor y = call->inplace || half ? x : like(x);
    const Tensor bits = at::empty({(x.numel() + 7) / 8}, x.options().dtype(at::kByte));
    if (on_device) {
      launch(x, RELU_FORWARD, groups(x), x.const_data_ptr(), const_cast<void*>(y.const_data_ptr()), bits.data_ptr(),
             static_cast<long long>(x.numel()));
    } else {
      kernel->relu_forward(x.const_data_ptr(), const_cast<void*>(y.const_data_ptr()), bits.data_ptr<uint8_t>(),
                           x.numel(), at::get_num_threads());
    }
    if (half) {
      if (call->inplace) {
        at::AutoDispatchBelowADInplaceOrView below;  // its version is counted where it is marked as dirty
        Tensor same = x;
        at::relu_(same);
      } else {
        y = at::relu(x);
      }
    }
    if (call->inplace) ctx->mark_dirty({x});
    keep(ctx, call, {y, bits});
    return y;
  }
};

// The input that an operation will overwrite, in a copy that has its history: a second derivative goes on through it.
// No input of the node's: its gradient is that of the input itself.
struct Original {
  Tensor copy;
};

// Keeps the input, as stock; a copy of it where it is overwritten.
struct Pointwise : Nonsmooth<Pointwise> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const CallPtr& call, const Original& original) {
    if (!call->inplace) {
      keep(ctx, call, {x});
      return stock_forward(*call, x);
    }
    keep(ctx, call, call->op == LEAKY_RELU ? variable_list{original.copy, x} : variable_list{original.copy});
    {
      at::AutoDispatchBelowADInplaceOrView below;  // its version is counted where it is marked as dirty
      stock_forward_(*call, x);
    }
    ctx->mark_dirty({x});
    return x;
  }
};

// Keeps the input, as stock, and two bytes per window, where stock keeps an index of eight bytes.
struct MaxPool2d : Nonsmooth<MaxPool2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const CallPtr& call) {
    const int64_t* at = call->geometry;
    const auto format = x.suggest_memory_format();
    const Tensor y = at::empty({at[0], at[1], at[4], at[5]}, x.options().memory_format(format));
    const Tensor masks = at::empty_like(y, y.options().dtype(at::kShort));
    if (gpu_of(x)) {  // where to look would be to wait: a window may be tied
      launch_pool(y, x, POOL_FORWARD, at, x.const_data_ptr(), y.data_ptr(), masks.data_ptr());
      keep(ctx, call, {x, masks});
      return y;
    }
    // What a window of zeros shares out ends in the stock ReLU right below, whatever the choice: none of its own
    // entries tied, or its gradient at 0 is not ours to choose.
    const auto& below = x.grad_fn();
    const bool dies = below && typeid(*below) == *stock_relu;
    call->tied = kernels_of(x)->pool_forward(x.const_data_ptr(), y.data_ptr(), masks.data_ptr<int16_t>(), at, !dies,
                                             at::get_num_threads());
    keep(ctx, call, {x, masks});
    return y;
  }
};

// ------------------------------------------------------------------------------------------------- calls from Python

Tensor kept(Tensor result, const CallPtr& call) {
  result.grad_fn()->add_pre_hook(std::make_unique<Keeper>(call));
  return result;
}

// Apply an operation; an undefined tensor where the Python way has to take it.
Tensor apply(const CallPtr& call, const Tensor& x) {
  const bool needed = differentiated(x);
  if (!plain(x) || !plain_thread() || torch::autograd::isFwGradDefined(x) || call->choice->observed()) return Tensor();
  if (call->op == MAX_POOL) {
    if (!needed || *call->choice->published) return Tensor();
    return kept(MaxPool2d::apply(x, call), call);
  }
  Kink kinks[2];
  kinks_of(*call, kinks);
  const bool tied = gpu_of(x) || kernels_of(x)->any_equal(x.const_data_ptr(), x.numel(), kinks[0].position,
                                                             kinks[1].position, at::get_num_threads());
  if (!needed || !tied) return call->inplace ? stock_forward_(*call, x) : stock_forward(*call, x);
  if (call->inplace && (x.is_view() || x.is_leaf())) return Tensor();
  if (call->inplace && call->op == LEAKY_RELU && call->parameters[0] < 0) return Tensor();  // refused there
  if (call->op == RELU) return kept(ReLU::apply(x, call), call);
  return kept(Pointwise::apply(x, call, Original{call->inplace ? like(x).copy_(x) : Tensor()}), call);
}

bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(THPVariableClass) ||
         Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(ParameterClass);
}

PyTypeObject* node_type = nullptr;  // of the Python objects of our nodes, known once there was one

template <typename Function>
AutogradContext* context_of(torch::autograd::Node* node) {
  auto* one = dynamic_cast<torch::autograd::CppNode<Function>*>(node);
  return one ? &one->ctx_ : nullptr;
}

AutogradContext* context_of(torch::autograd::Node* node) {
  if (auto* context = context_of<ReLU>(node)) return context;
  if (auto* context = context_of<Pointwise>(node)) return context;
  return context_of<MaxPool2d>(node);
}

// Whether compiled autograd is switched on: it takes Python's nodes whole, and C++ nodes with a break in its graph.
bool compiled_autograd() {
  static PyObject* const name = PyUnicode_InternFromString("torch._dynamo.compiled_autograd");
  static PyObject* const flag = PyUnicode_InternFromString("compiled_autograd_enabled");
  PyObject* module = PyDict_GetItem(PyImport_GetModuleDict(), name);  // absent as long as nothing was compiled
  return module && PyModule_Check(module) && PyDict_GetItem(PyModule_GetDict(module), flag) == Py_True;
}

PyObject* applied(const CallPtr& call, PyObject* object) {
  if (compiled_autograd()) return Py_NewRef(Py_NotImplemented);
  const Tensor x = THPVariable_Unpack(object);
  if (x.is_cuda() && x.get_device() < DEVICES && !asked[x.get_device()] && plain_thread()) {
    THPObjectPtr known(PyObject_CallMethod(python, "_connect", "i", static_cast<int>(x.get_device())));
    if (!known) throw python_error();
    asked[x.get_device()] = PyObject_IsTrue(known.get());
  }
  if (gpu_of(x) && !call->choice->fixed && !call->choice->on_device[index_of(x)] && plain_thread()) {
    THPObjectPtr held(PyObject_CallMethod(python, "_hold", "OO", call->selection, object));
    if (!held) throw python_error();
  }
  Tensor result;
  {
    NoGIL free;
    result = apply(call, x);
  }
  if (!result.defined()) return Py_NewRef(Py_NotImplemented);
  if (!node_type && result.grad_fn() && context_of(result.grad_fn().get())) {
    THPObjectPtr node(torch::autograd::functionToPyObject(result.grad_fn()));
    node_type = Py_TYPE(node.get());
  }
  return call->inplace ? Py_NewRef(object) : THPVariable_Wrap(result);
}

// One number, or two that may be different, of a module's or a function's argument.
bool two_numbers(PyObject* value, int64_t* into) {
  if (PyLong_Check(value)) {
    into[0] = into[1] = PyLong_AsLongLong(value);
    return !PyErr_Occurred();
  }
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 2) return false;
  for (int i = 0; i < 2; ++i) {
    PyObject* one = PyTuple_GET_ITEM(value, i);
    if (!PyLong_Check(one)) return false;
    into[i] = PyLong_AsLongLong(one);
  }
  return !PyErr_Occurred();
}

// Complete a pooling's geometry for an input; false where the kernels do not take it, or stock would complain.
bool complete(Call& call, bool ceil_mode, const Tensor& x) {
  int64_t* at = call.geometry;
  call.ceil_mode = ceil_mode;
  const int64_t *kernel = at + 6, *stride = at + 8, *padding = at + 10, *dilation = at + 12;
  if (x.dim() != 4 || x.numel() == 0 || kernel[0] * kernel[1] > 16) return false;
  const bool contiguous = x.is_contiguous();
  if (!contiguous && !x.is_contiguous(at::MemoryFormat::ChannelsLast)) return false;
  for (int i = 0; i < 2; ++i) {
    const int64_t size = x.size(2 + i), k = kernel[i], s = stride[i], p = padding[i], d = dilation[i];
    if (k < 1 || s < 1 || d < 1 || p < 0 || 2 * p > k || (p && d > 1)) return false;
    const int64_t room = size + 2 * p - d * (k - 1) - 1;
    if (room < 0) return false;
    int64_t windows = (room + (ceil_mode ? s - 1 : 0)) / s + 1;
    if (ceil_mode && (windows - 1) * s >= size + p) --windows;  // the last window has to start inside
    if (windows < 1) return false;
    at[4 + i] = windows;
  }
  for (int i = 0; i < 4; ++i) at[i] = x.size(i);
  at[14] = !contiguous;
  // The shares of overlapping windows in half precision are summed up as they are composed, where that is at once.
  return x.element_size() > 2 || gpu_of(x) || x.is_cuda() || disjoint(at) || kernel[0] * kernel[1] <= AT_ONCE;
}

// ------------------------------------------------------------------------- a patched module's call, as a Python object

// Takes the only argument of a module's forward. It holds the module's attributes, so the garbage collector knows it.
struct Site {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject *attributes, *selection;
  std::shared_ptr<const Choice>* choice;
  int op;
};

// The attributes of the modules, in the order of their meaning.
const char* const ATTRIBUTES[] = {"inplace", "negative_slope", "min_val", "max_val", "kernel_size", "stride",
                                  "padding", "dilation", "ceil_mode", "return_indices"};
PyObject* attribute_names[std::size(ATTRIBUTES)];
enum Attribute : int { INPLACE, NEGATIVE_SLOPE, MIN_VAL, MAX_VAL, KERNEL_SIZE, STRIDE, PADDING, DILATION, CEIL_MODE,
                       RETURN_INDICES };

bool number(PyObject* attributes, Attribute name, double& into) {
  PyObject* value = PyDict_GetItem(attributes, attribute_names[name]);
  if (!value || !(PyFloat_Check(value) || PyLong_Check(value))) return false;
  into = PyFloat_AsDouble(value);
  return !PyErr_Occurred();
}

bool truth(PyObject* attributes, Attribute name) {
  PyObject* value = PyDict_GetItem(attributes, attribute_names[name]);
  return value == Py_True;
}

bool numbers(PyObject* attributes, Attribute name, int64_t* into) {
  PyObject* value = PyDict_GetItem(attributes, attribute_names[name]);
  return value && two_numbers(value, into);
}

// Read a module's attributes, which its owner may have changed, into a call.
bool read(const Site* site, Call& call, const Tensor& x) {
  PyObject* attributes = site->attributes;
  if (call.op == MAX_POOL) {
    int64_t* at = call.geometry;
    return !truth(attributes, RETURN_INDICES) && numbers(attributes, KERNEL_SIZE, at + 6) &&
           numbers(attributes, STRIDE, at + 8) && numbers(attributes, PADDING, at + 10) &&
           numbers(attributes, DILATION, at + 12) && complete(call, truth(attributes, CEIL_MODE), x);
  }
  call.inplace = truth(attributes, INPLACE);
  if (call.op == LEAKY_RELU) {
    return number(attributes, NEGATIVE_SLOPE, call.parameters[0]) && (!call.inplace || call.parameters[0] >= 0);
  }
  if (call.op == HARDTANH) {
    return number(attributes, MIN_VAL, call.parameters[0]) && number(attributes, MAX_VAL, call.parameters[1]) &&
           !(call.parameters[0] == 0 && call.parameters[1] == 6) && call.parameters[0] <= call.parameters[1];
  }
  return true;
}

PyObject* site_call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  HANDLE_TH_ERRORS
  const auto* site = reinterpret_cast<Site*>(self);
  if (PyVectorcall_NARGS(flags) != 1 || names || !site->attributes || !is_tensor(args[0])) {
    return Py_NewRef(Py_NotImplemented);
  }
  auto call = c10::make_intrusive<Call>(static_cast<Op>(site->op), *site->choice, site->selection);
  if (!read(site, *call, THPVariable_Unpack(args[0]))) {
    PyErr_Clear();
    return Py_NewRef(Py_NotImplemented);
  }
  return applied(call, args[0]);
  END_HANDLE_TH_ERRORS
}

int site_traverse(PyObject* self, visitproc visit, void* arg) {
  auto* site = reinterpret_cast<Site*>(self);
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(site->attributes);
  Py_VISIT(site->selection);
  return 0;
}

int site_clear(PyObject* self) {
  auto* site = reinterpret_cast<Site*>(self);
  Py_CLEAR(site->attributes);
  Py_CLEAR(site->selection);
  return 0;
}

void site_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  site_clear(self);
  delete reinterpret_cast<Site*>(self)->choice;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef site_members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Site, vectorcall), READONLY, nullptr},
                              {nullptr, 0, 0, 0, nullptr}};
PyType_Slot site_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(site_dealloc)},
                            {Py_tp_traverse, reinterpret_cast<void*>(site_traverse)},
                            {Py_tp_clear, reinterpret_cast<void*>(site_clear)},
                            {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                            {Py_tp_members, site_members},
                            {0, nullptr}};
PyType_Spec site_spec = {"_nslightning_nodes.Site", sizeof(Site), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                             Py_TPFLAGS_DISALLOW_INSTANTIATION,
                         site_slots};
PyTypeObject* site_type = nullptr;

// ------------------------------------------------------------------------------------------------ the module's functions

const char* const CHOICE = "nslightning.Choice";

const std::shared_ptr<const Choice>& choice_of(PyObject* capsule) {
  auto* choice = static_cast<std::shared_ptr<const Choice>*>(PyCapsule_GetPointer(capsule, CHOICE));
  if (!choice) throw python_error();
  return *choice;
}

int op_of(const char* name) {
  for (int op = 0; op < OPS; ++op) {
    if (std::string(name) == NAMES[op]) return op;
  }
  return -1;
}

// share(kinks, pool, published, watched, fixed): the memory of a Selection's tensors; kinks in the order of NAMES.
PyObject* share(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *kinks, *pool, *published, *watched;
  int fixed;
  if (!PyArg_ParseTuple(args, "OOOOp", &kinks, &pool, &published, &watched, &fixed)) return nullptr;
  auto* held = new std::shared_ptr<const Choice>(new Choice(kinks, pool, published, watched, fixed));
  return PyCapsule_New(held, CHOICE, [](PyObject* capsule) {
    delete static_cast<std::shared_ptr<const Choice>*>(PyCapsule_GetPointer(capsule, CHOICE));
  });
  END_HANDLE_TH_ERRORS
}

// hold(choice, index, kinks, pool, published): the same numbers in the memory of a device.
PyObject* hold(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *capsule, *kinks, *pool, *published;
  int index;
  if (!PyArg_ParseTuple(args, "OiOOO", &capsule, &index, &kinks, &pool, &published)) return nullptr;
  const auto& choice = choice_of(capsule);
  TORCH_CHECK(index >= 0 && index < DEVICES, "no device ", index);
  auto numbers = std::make_unique<const Numbers>(kinks, pool, published);
  const Numbers* none = nullptr;  // nodes may read what is there: it stays
  if (choice->on_device[index].compare_exchange_strong(none, numbers.get())) numbers.release();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// site(operation, selection, choice, attributes): the object that takes a module's calls.
PyObject* make_site(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  const char* name;
  PyObject *selection, *capsule, *attributes;
  if (!PyArg_ParseTuple(args, "sOOO!", &name, &selection, &capsule, &PyDict_Type, &attributes)) return nullptr;
  const int op = op_of(name);
  TORCH_CHECK(op >= 0, "no C++ node for ", name);
  auto* site = PyObject_GC_New(Site, site_type);
  if (!site) return nullptr;
  site->vectorcall = site_call;
  site->attributes = Py_NewRef(attributes);
  site->selection = Py_NewRef(selection);
  site->choice = new std::shared_ptr<const Choice>(choice_of(capsule));
  site->op = op;
  PyObject_GC_Track(reinterpret_cast<PyObject*>(site));
  return reinterpret_cast<PyObject*>(site);
  END_HANDLE_TH_ERRORS
}

// pointwise(operation, x, selection, choice, inplace, first, second): the parameters are numbers, NaN where absent.
PyObject* pointwise(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7, "pointwise takes 7 arguments");
  if (!is_tensor(args[1])) return Py_NewRef(Py_NotImplemented);
  const char* name = PyUnicode_AsUTF8(args[0]);
  if (!name) return nullptr;
  const int op = op_of(name);
  if (op < 0 || op == MAX_POOL) return Py_NewRef(Py_NotImplemented);
  auto call = c10::make_intrusive<Call>(static_cast<Op>(op), choice_of(args[3]), args[2]);
  call->inplace = args[4] == Py_True;
  for (int i = 0; i < 2; ++i) call->parameters[i] = PyFloat_AsDouble(args[5 + i]);
  if (PyErr_Occurred()) return nullptr;
  return applied(call, args[1]);
  END_HANDLE_TH_ERRORS
}

// max_pool2d(x, selection, choice, kernel, stride, padding, dilation, ceil_mode): pairs of numbers.
PyObject* max_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 8, "max_pool2d takes 8 arguments");
  if (!is_tensor(args[0])) return Py_NewRef(Py_NotImplemented);
  auto call = c10::make_intrusive<Call>(MAX_POOL, choice_of(args[2]), args[1]);
  for (int i = 0; i < 4; ++i) {
    if (!two_numbers(args[3 + i], call->geometry + 6 + 2 * i)) {
      PyErr_Clear();
      return Py_NewRef(Py_NotImplemented);
    }
  }
  if (!complete(*call, args[7] == Py_True, THPVariable_Unpack(args[0]))) return Py_NewRef(Py_NotImplemented);
  return applied(call, args[0]);
  END_HANDLE_TH_ERRORS
}

// The context of a node of ours; null for all others.
AutogradContext* context_of(PyObject* object) {
  if (Py_TYPE(object) != node_type) return nullptr;
  return context_of(reinterpret_cast<torch::autograd::THPCppFunction*>(object)->cdata.get());
}

// describe(node): (operation, selection, tied), or None.
PyObject* describe(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  auto* context = context_of(object);
  if (!context || context->saved_data.empty()) Py_RETURN_NONE;
  const Call& call = call_of(context);
  return Py_BuildValue("(sOO)", NAMES[call.op], call.selection, call.tied ? Py_True : Py_False);
  END_HANDLE_TH_ERRORS
}

// backward(node, g): the gradient under the choice that the selection holds now.
PyObject* backward(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *object, *incoming;
  if (!PyArg_ParseTuple(args, "OO", &object, &incoming)) return nullptr;
  auto* context = context_of(object);
  TORCH_CHECK(context, "not one of the package's nodes");
  if (incoming == Py_None) Py_RETURN_NONE;
  const Call& call = call_of(context);
  const Tensor g = THPVariable_Unpack(incoming);
  Tensor result;
  {
    NoGIL free;
    result = gradient_of(call, saved_by(context, call), g);
  }
  return THPVariable_Wrap(result);
  END_HANDLE_TH_ERRORS
}

// release(node): free what it saved; whether it is a node of ours.
PyObject* release(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  if (!context_of(object)) Py_RETURN_FALSE;
  reinterpret_cast<torch::autograd::THPCppFunction*>(object)->cdata->release_variables();
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

template <typename F>
void take(PyObject* addresses, const char* name, const char* dtype, F*& into) {
  PyObject* value = PyDict_GetItemString(addresses, (std::string(name) + "_" + dtype).c_str());
  TORCH_CHECK(value, "no kernel ", name, " for ", dtype);
  into = reinterpret_cast<F*>(PyLong_AsVoidPtr(value));
}

// connect(module, addresses, at_lower, at_upper, relu): native.py, the kernels by name, stock's derivatives of clamp, a
// result of stock's ReLU.
PyObject* connect(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *module, *addresses, *relu;
  if (!PyArg_ParseTuple(args, "OO!ddO", &module, &PyDict_Type, &addresses, &at_lower, &at_upper, &relu)) return nullptr;
  const auto node = THPVariable_Unpack(relu).grad_fn();
  TORCH_CHECK(node, "the result of ReLU has no node");
  stock_relu = &typeid(*node);
  for (int i = 0; i < DTYPES; ++i) {
    auto& of = kernels[i];
    const char* dtype = dtype_names[i];
    take(addresses, "any_equal", dtype, of.any_equal);
    take(addresses, "relu_forward", dtype, of.relu_forward);
    take(addresses, "relu_backward", dtype, of.relu_backward);
    take(addresses, "linear_backward", dtype, of.linear_backward);
    take(addresses, "replace", dtype, of.replace);
    take(addresses, "pool_forward", dtype, of.pool_forward);
    take(addresses, "pool_backward", dtype, of.pool_backward);
  }
  Py_XDECREF(python);
  python = Py_NewRef(module);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// load(index, image, driver, host): the kernels for a CUDA device, and the library that launches them. `host` lets CPU
// tensors take them, for a test without a GPU; without an image they no longer do.
PyObject* load(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  int index, host;
  const char *image, *library;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "iz#sp", &index, &image, &size, &library, &host)) return nullptr;
  TORCH_CHECK(index >= 0 && index < DEVICES, "no device ", index);
  devices[index] = image ? new Device(library, index, image) : nullptr;
  host_is_device = host && image;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// count_in_64_bits(beyond): for a test: the entries beyond which indices have 64 bits. Returns what it was.
PyObject* count_in_64_bits(PyObject*, PyObject* beyond) {
  HANDLE_TH_ERRORS
  const int64_t before = narrow_limit;
  narrow_limit = PyLong_AsLongLong(beyond);
  return PyLong_FromLongLong(before);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"connect", connect, METH_VARARGS, nullptr},
    {"load", load, METH_VARARGS, nullptr},
    {"count_in_64_bits", count_in_64_bits, METH_O, nullptr},
    {"share", share, METH_VARARGS, nullptr},
    {"hold", hold, METH_VARARGS, nullptr},
    {"site", make_site, METH_VARARGS, nullptr},
    {"pointwise", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pointwise)), METH_FASTCALL, nullptr},
    {"max_pool2d", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(max_pool2d)), METH_FASTCALL, nullptr},
    {"describe", describe, METH_O, nullptr},
    {"backward", backward, METH_VARARGS, nullptr},
    {"release", release, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_nslightning_nodes", nullptr, -1, methods, nullptr, nullptr, nullptr,
                          nullptr};

}  // namespace nslightning

PyMODINIT_FUNC PyInit__nslightning_nodes() {
  HANDLE_TH_ERRORS
  using namespace nslightning;
  THPObjectPtr module(PyModule_Create(&definition));
  if (!module) return nullptr;
  for (size_t i = 0; i < std::size(ATTRIBUTES); ++i) attribute_names[i] = PyUnicode_InternFromString(ATTRIBUTES[i]);
  site_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&site_spec));
  if (!site_type) return nullptr;
  return module.release();
  END_HANDLE_TH_ERRORS
}
