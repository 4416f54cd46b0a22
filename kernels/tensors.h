// Tensors that Python hands to an extension, see native.py, and when a call with them may be done
// at once, past torch's dispatcher.
#pragma once
#include <torch/csrc/autograd/python_variable.h>  // first: it includes Python.h

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>

#include <cstdlib>
#include <cstring>
#include <optional>

#include "lanes.h"

// Whether nobody looks on: no profiler, no dispatch mode, and C++ is not switched off.
inline bool alone() {
  const char* off = std::getenv("SEQMIX_NO_CPP");
  return !(off && *off && std::strcmp(off, "0")) && !at::hasCallbacks() &&
         !c10::impl::dispatch_mode_enabled();
}

// The tensor, where it is nothing but numbers in the CPU's memory: contiguous, of no subclass, in
// none of functorch's wrappers, and no gradient is to be kept of it. Else null.
inline const at::Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& x = THPVariable_Unpack(object);
  const auto keys = x.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView -
                    c10::autocast_dispatch_keyset;
  const bool dense = keys == c10::DispatchKeySet(c10::DispatchKey::CPU) && x.is_contiguous();
  return dense && !(x.requires_grad() && c10::GradMode::is_enabled()) ? &x : nullptr;
}

// In lanes.h's numbering; none for a dtype that C++ does not read.
inline std::optional<Dtype> dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return FLOAT32;
    case at::kDouble: return FLOAT64;
    case at::kBFloat16: return BFLOAT16;
    default: return std::nullopt;
  }
}

// In this dtype and contiguous.
inline at::Tensor readable(const at::Tensor& x, Dtype dtype) {
  constexpr at::ScalarType names[] = {at::kFloat, at::kDouble, at::kBFloat16};
  return x.to(names[dtype]).contiguous();
}

// Lets other threads of Python run while it lives.
class WithoutPython {
 public:
  WithoutPython() : saved_(PyEval_SaveThread()) {}
  ~WithoutPython() { PyEval_RestoreThread(saved_); }

 private:
  PyThreadState* saved_;
};

// The functions of an extension called `name`, the stem of its source: each is given its arguments
// as they stand in Python, and the caller has to give as many as it reads.
#define FUNCTION(name) {#name, reinterpret_cast<PyCFunction>(name), METH_FASTCALL, nullptr}
#define EXTENSION(name, ...)                                                    \
  PyMODINIT_FUNC PyInit_##name() {                                              \
    static PyMethodDef functions[] = {__VA_ARGS__, {nullptr, nullptr, 0, nullptr}}; \
    static PyModuleDef module{PyModuleDef_HEAD_INIT, #name, nullptr, -1, functions}; \
    return PyModule_Create(&module);                                            \
  }
