// A few tokens of linear attention, one after another: the state is read once and written once for
// each. The equations are those of step.py.
//
// An extension, as a step on a small state takes less time than a call from Python to a library.
#include "tensors.h"

#include <ATen/Parallel.h>

#include <cstddef>
#include <vector>

// From so many numbers in the state on a second thread is worth its start.
constexpr int64_t ONE_THREAD = 1 << 18;

// q, k (batch, length, heads, K), v, y (batch, length, heads, V) and padding (batch, length) are
// contiguous; the states are in the dtype of sums. Null is what is not given.
struct Problem {
  int64_t batch, length, heads, K, V;
  bool normalize;
  double scale, eps;
  const void *q, *k, *v, *S, *z;
  const bool* padding;
  void *y, *S_after, *z_after;
};

template <class T, class In>
class Steps {
 public:
  explicit Steps(const Problem& p) : p_(p), k_(p.K), q_(p.K), v_(p.V), out_(p.V) {}

  // All tokens of one head.
  void run(int64_t b, int64_t h) {
    const int64_t KV = p_.K * p_.V, bh = b * p_.heads + h;
    const T* S = p_.S ? static_cast<const T*>(p_.S) + bh * KV : nullptr;
    const T* z = p_.z ? static_cast<const T*>(p_.z) + bh * p_.K : nullptr;
    T* S_after = static_cast<T*>(p_.S_after) + bh * KV;
    T* z_after = static_cast<T*>(p_.z_after) + bh * p_.K;
    for (int64_t t = 0; t < p_.length; ++t) {
      const int64_t token = b * p_.length + t, row = token * p_.heads + h;
      const bool padding = p_.padding && p_.padding[token];
      load(p_.k, row, p_.K, k_.data());
      load(p_.q, row, p_.K, q_.data());
      load(p_.v, row, p_.V, v_.data());
      if (padding) k_.assign(p_.K, T(0));
      token_of(S, z, S_after, z_after);
      S = S_after;
      z = z_after;
      In* y = static_cast<In*>(p_.y) + row * p_.V;
      for (int64_t j = 0; j < p_.V; ++j) y[j] = convert<In>(padding ? T(0) : out_[j]);
    }
  }

 private:
  static void load(const void* from, int64_t row, int64_t width, T* to) {
    const In* p = static_cast<const In*>(from) + row * width;
    for (int64_t i = 0; i < width; ++i) to[i] = convert<T>(p[i]);
  }

  void token_of(const T* S, const T* z, T* S_after, T* z_after) {
    for (T& q : q_) q *= static_cast<T>(p_.scale);
    for (int64_t i = 0; i < p_.K; ++i) z_after[i] = (z ? z[i] : T(0)) + k_[i];
    constexpr int64_t W = WIDTH<T>;
    int64_t j = 0;
    for (; j + 4 * W <= p_.V; j += 4 * W) columns<4>(S, S_after, j);
    for (; j + W <= p_.V; j += W) columns<1>(S, S_after, j);
    for (; j < p_.V; ++j) {
      out_[j] = 0;
      for (int64_t i = 0; i < p_.K; ++i) {
        const int64_t at = i * p_.V + j;
        S_after[at] = (S ? S[at] : T(0)) + k_[i] * v_[j];
        out_[j] += q_[i] * S_after[at];
      }
    }
    if (!p_.normalize) return;
    T weight = static_cast<T>(p_.eps);
    for (int64_t i = 0; i < p_.K; ++i) weight += q_[i] * z_after[i];
    for (T& y : out_) y /= weight;
  }

  static Loose<T>* vectors(T* at) { return reinterpret_cast<Loose<T>*>(at); }
  static const Loose<T>* vectors(const T* at) { return reinterpret_cast<const Loose<T>*>(at); }

  // N vectors of the state's columns from j on: their sums stay in registers.
  template <int N>
  void columns(const T* S, T* S_after, int64_t j) {
    Vec<T> v[N], out[N]{};
    for (int n = 0; n < N; ++n) v[n] = vectors(&v_[j])[n];
    for (int64_t i = 0; i < p_.K; ++i) {
      const T k = k_[i], q = q_[i];
      const Loose<T>* before = S ? vectors(S + i * p_.V + j) : nullptr;
      Loose<T>* after = vectors(S_after + i * p_.V + j);
      for (int n = 0; n < N; ++n) {
        const Vec<T> now = k * v[n] + (S ? before[n] : Vec<T>{});
        after[n] = now;
        out[n] += q * now;
      }
    }
    for (int n = 0; n < N; ++n) vectors(&out_[j])[n] = out[n];
  }

  const Problem& p_;
  std::vector<T> k_, q_, v_, out_;
};

template <class T, class In>
void all_heads(const Problem& p) {
  const bool many = p.batch * p.heads * p.K * p.V >= ONE_THREAD;
#pragma omp parallel num_threads(at::get_num_threads()) if (many)
  {
    Steps<T, In> steps(p);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.batch * p.heads; ++i) steps.run(i / p.heads, i % p.heads);
  }
}

struct Result {
  at::Tensor y, S, z;
};

using Optional = std::optional<at::Tensor>;

const void* address(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }

// y, S and z of contiguous tensors: q, k and v of one dtype, S and z of the dtype of sums.
Result steps_of(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& S,
    const Optional& z, const Optional& padding, double scale, bool normalize, double eps, Dtype dtype) {
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), V = v.size(3);
  const auto sums = at::TensorOptions(dtype == FLOAT64 ? at::kDouble : at::kFloat);
  Result after{
      at::empty({B, T, H, V}, v.options()), at::empty({B, H, K, V}, sums), at::empty({B, H, K}, sums)};
  const Problem problem{
      B, T, H, K, V, normalize, scale, eps,
      q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), address(S), address(z),
      static_cast<const bool*>(address(padding)),
      after.y.data_ptr(), after.S.data_ptr(), after.z.data_ptr()};
  const WithoutPython others_run;
  with_dtype(dtype, [&](auto sum, auto x) { all_heads<decltype(sum), decltype(x)>(problem); });
  return after;
}

Optional optional(PyObject* object) {
  return object == Py_None ? Optional{} : THPVariable_Unpack(object);
}

// steps(q, k, v, S, z, padding, scale, normalize, eps) -> (y, S, z), of whatever tensors.
PyObject* steps(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor& v = THPVariable_Unpack(given[2]);
  const at::Tensor* tokens[] = {&THPVariable_Unpack(given[0]), &THPVariable_Unpack(given[1]), &v};
  bool same = true, wide = false;
  for (const at::Tensor* x : tokens) {
    same = same && x->scalar_type() == v.scalar_type();
    wide = wide || x->scalar_type() == at::kDouble;
  }
  const Dtype sums = wide ? FLOAT64 : FLOAT32, stored = same ? dtype_of(v).value_or(sums) : sums;
  Optional others[] = {optional(given[3]), optional(given[4]), optional(given[5])};
  for (int i = 0; i < 2; ++i)
    if (others[i]) others[i] = readable(*others[i], sums);
  if (others[2]) others[2] = others[2]->contiguous();
  const Result after = steps_of(
      readable(*tokens[0], stored), readable(*tokens[1], stored), readable(v, stored), others[0],
      others[1], others[2], PyFloat_AsDouble(given[6]), given[7] == Py_True,
      PyFloat_AsDouble(given[8]), stored);
  return Py_BuildValue(
      "NNN", THPVariable_Wrap(after.y.to(v.scalar_type())), THPVariable_Wrap(after.S),
      THPVariable_Wrap(after.z));
  END_HANDLE_TH_ERRORS
}

// step(q, k, v, (S, z), scale, normalize, eps) -> (y, (S, z)), of one token; or None where
// anything is out of the ordinary and the call has to go the long way, with its checks.
PyObject* step(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  PyObject* state = given[3];
  if (!PyTuple_Check(state) || PyTuple_GET_SIZE(state) != 2 || !alone()) Py_RETURN_NONE;
  const at::Tensor *q = plain(given[0]), *k = plain(given[1]), *v = plain(given[2]);
  const at::Tensor *S = plain(PyTuple_GET_ITEM(state, 0)), *z = plain(PyTuple_GET_ITEM(state, 1));
  if (!q || !k || !v || !S || !z || q->dim() != 4 || v->dim() != 4) Py_RETURN_NONE;
  const std::optional<Dtype> dtype = dtype_of(*v);
  const auto sums = dtype == FLOAT64 ? at::kDouble : at::kFloat;
  const int64_t B = q->size(0), H = q->size(2), K = q->size(3), V = v->size(3);
  const bool fits = dtype && q->scalar_type() == v->scalar_type() &&
                    k->scalar_type() == v->scalar_type() && S->scalar_type() == sums &&
                    z->scalar_type() == sums && q->size(1) == 1 && k->sizes() == q->sizes() &&
                    v->sizes() == at::IntArrayRef({B, 1, H, V}) &&
                    S->sizes() == at::IntArrayRef({B, H, K, V}) &&
                    z->sizes() == at::IntArrayRef({B, H, K});
  if (!fits) Py_RETURN_NONE;
  const Result after = steps_of(
      *q, *k, *v, *S, *z, {}, PyFloat_AsDouble(given[4]), given[5] == Py_True,
      PyFloat_AsDouble(given[6]), *dtype);
  return Py_BuildValue(
      "N(NN)", THPVariable_Wrap(after.y), THPVariable_Wrap(after.S), THPVariable_Wrap(after.z));
  END_HANDLE_TH_ERRORS
}

EXTENSION(step, FUNCTION(steps), FUNCTION(step))
