// The selective scan of kernels/selective_scan/__init__.py, forward and backward, in one pass over
// the inputs: lanes are channels, so that a step needs no sum across lanes, and B and C broadcast.
//
// B batch, D channels, L time, N state, G groups. The work is cut into units of one row and up to
// CHUNK channels of one group, whatever the number of threads, so that sums have one order. A unit
// goes through time in tiles; a tile's inputs are brought into vectors over channels first.

#include <algorithm>
#include <memory>

#include "arrays.h"

namespace {

constexpr int CHUNK = 64;
constexpr int AT_ONCE = 4;  // states; those behind the last of N have rate, B and C 0, and stay 0
enum Flag : uint8_t { PLAIN, RESTART, PADDING };  // what segments say about a position

}  // namespace

extern "C" struct Problem {
  int64_t batch, channels, length, states, groups, steps, threads, delta_softplus;
  Array u, delta, B, C, z;
  // Contiguous, in the dtype of states: (D, N), (D,), (D,), (B, D, N); null where not given.
  const void *A, *D, *delta_bias, *initial_state;
  const uint8_t* flags;  // (B, L)
  void* kept;            // (tiles, B, N, D), the states in front of the tiles; null: not kept
  Array y;               // forward only
  void* last;            // forward only, (B, D, N)
  // Backward only. Parts are to be summed over their first dimension.
  Array grad_y, grad_u, grad_delta, grad_z;
  const void* grad_last;       // (B, D, N)
  void *grad_initial, *parts_A;  // (B, D, N)
  void *parts_D, *parts_bias;    // (B, D)
  void *parts_B, *parts_C;       // (chunks, B, G, L, N)
};

namespace {

template <class T>
using Buffer = std::unique_ptr<Vec<T>[]>;

template <class T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(new Vec<T>[size]());
}

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Up to WIDTH channels: what does not depend on time.
template <class T>
struct Block {
  int64_t channel;
  int rows;
  Vec<T> skip{}, bias{};
  Buffer<T> rates, state;  // M vectors each: A log2(e), and h or its adjoint
};

// (.., D, N) -> N vectors over channels, and back.
template <class T>
void gather(const void* from, int64_t first, int rows, int64_t N, Vec<T>* out) {
  const T* p = static_cast<const T*>(from) + first * N;
  for (int64_t n = 0; n < N; ++n)
    for (int i = 0; i < rows; ++i) out[n][i] = p[i * N + n];
}

template <class T>
void scatter(const Vec<T>* in, int64_t first, int rows, int64_t N, void* to) {
  T* p = static_cast<T*>(to) + first * N;
  for (int64_t n = 0; n < N; ++n)
    for (int i = 0; i < rows; ++i) p[i * N + n] = in[n][i];
}

// One row and up to CHUNK channels of one group.
template <class T>
struct Unit {
  static constexpr int W = WIDTH<T>;
  const Problem& p;
  int64_t row, group, chunk;
  int64_t N, M, pitch;  // M: N rounded up; pitch: of B and C in a tile
  int num_blocks;
  Block<T> blocks[CHUNK / W];
  Buffer<T> B, C;                     // (steps, pitch / W) vectors over states
  Buffer<T> u, delta, step, z, y, g;  // (steps) vectors over channels

  Unit(const Problem& p, int64_t index) : p(p), N(p.states), M(rounded_up(N, AT_ONCE)), pitch(rounded_up(N, W)) {
    const int64_t width = p.channels / p.groups, chunks = (width + CHUNK - 1) / CHUNK;
    chunk = index % chunks;
    group = index / chunks % p.groups;
    row = index / chunks / p.groups;
    const int64_t first = group * width + chunk * CHUNK;
    const int64_t end = std::min(first + CHUNK, (group + 1) * width);
    num_blocks = static_cast<int>((end - first + W - 1) / W);
    for (int j = 0; j < num_blocks; ++j) {
      Block<T>& block = blocks[j];
      block.channel = first + j * W;
      block.rows = static_cast<int>(std::min<int64_t>(W, end - block.channel));
      block.rates = buffer<T>(M);
      block.state = buffer<T>(M);
      gather<T>(p.A, block.channel, block.rows, N, block.rates.get());
      for (int64_t n = 0; n < N; ++n) block.rates[n] *= T(LOG2E);
      if (p.D) gather<T>(p.D, block.channel, block.rows, 1, &block.skip);
      if (p.delta_bias) gather<T>(p.delta_bias, block.channel, block.rows, 1, &block.bias);
    }
    B = buffer<T>(p.steps * pitch / W);
    C = buffer<T>(p.steps * pitch / W);
    for (Buffer<T>* each : {&u, &delta, &step, &z, &y, &g}) *each = buffer<T>(p.steps);
  }

  int64_t state_index(const Block<T>& block) const { return row * p.channels + block.channel; }

  const uint8_t* flags(int64_t start) const {
    return p.flags ? p.flags + row * p.length + start : nullptr;
  }

  Piece piece(const Block<T>& block, int64_t start, int steps) const {
    return {row, 0, block.channel, start, block.rows, steps};
  }

  T* kept(const Block<T>& block, int64_t tile) const {
    return static_cast<T*>(p.kept) + (tile * p.batch + row) * N * p.channels + block.channel;
  }

  void read_shared(int64_t start, int steps) {
    for (int64_t n = 0; n < N; n += W) {
      const Piece at{row, group, n, start, static_cast<int>(std::min<int64_t>(W, N - n)), steps};
      load<T>(p.B, at, reinterpret_cast<T*>(B.get()) + n, pitch);
      load<T>(p.C, at, reinterpret_cast<T*>(C.get()) + n, pitch);
    }
  }

  void read(const Block<T>& block, int64_t start, int steps) {
    const Piece at = piece(block, start, steps);
    load<T>(p.u, at, u.get());
    load<T>(p.delta, at, delta.get());
    if (p.z.data) load<T>(p.z, at, z.get());
    const uint8_t* flag = flags(start);
    for (int t = 0; t < steps; ++t) {
      delta[t] += block.bias;
      step[t] = p.delta_softplus ? softplus(delta[t]) : delta[t];
      if (flag && flag[t] == PADDING) step[t] = Vec<T>{};
    }
  }

  // y before the gate, and h in the place of `h`; with KEEP also every decay and state.
  template <bool KEEP>
  void advance(const Block<T>& block, int64_t start, int steps, Vec<T>* __restrict__ h,
               Vec<T>* __restrict__ decays, Vec<T>* __restrict__ states) {
    const Vec<T>* __restrict__ rates = block.rates.get();
    const uint8_t* flag = flags(start);
    for (int t = 0; t < steps; ++t) {
      const T* b = reinterpret_cast<const T*>(B.get()) + t * pitch;
      const T* c = reinterpret_cast<const T*>(C.get()) + t * pitch;
      const bool restart = flag && flag[t] == RESTART;
      const Vec<T> size = step[t], input = size * u[t];
      Vec<T> sum = block.skip * u[t];
      if (restart) std::fill(h, h + M, Vec<T>{});
      for (int64_t n = 0; n < M; n += AT_ONCE) {
        Vec<T> a[AT_ONCE];
        exp2_products<AT_ONCE>(size, rates + n, a);
        for (int k = 0; k < AT_ONCE; ++k) {
          const Vec<T> now = a[k] * h[n + k] + input * b[n + k];
          h[n + k] = now;
          sum += now * c[n + k];
          if constexpr (KEEP) {
            decays[t * M + n + k] = restart ? Vec<T>{} : a[k];
            states[t * M + n + k] = now;
          }
        }
      }
      y[t] = sum;
    }
  }

  void forward() {
    for (int j = 0; p.initial_state && j < num_blocks; ++j)
      gather<T>(p.initial_state, state_index(blocks[j]), blocks[j].rows, N, blocks[j].state.get());
    for (int64_t start = 0; start < p.length; start += p.steps) {
      const int steps = static_cast<int>(std::min(p.steps, p.length - start));
      read_shared(start, steps);
      for (int j = 0; j < num_blocks; ++j) {
        Block<T>& block = blocks[j];
        if (p.kept) keep(block, start / p.steps);
        read(block, start, steps);
        advance<false>(block, start, steps, block.state.get(), nullptr, nullptr);
        for (int t = 0; p.z.data && t < steps; ++t) y[t] *= z[t] * sigmoid(z[t]);
        store<T>(p.y, piece(block, start, steps), y.get());
      }
    }
    for (int j = 0; j < num_blocks; ++j)
      scatter<T>(blocks[j].state.get(), state_index(blocks[j]), blocks[j].rows, N, p.last);
  }

  void keep(const Block<T>& block, int64_t tile) const {
    T* to = kept(block, tile);
    for (int64_t n = 0; n < N; ++n)
      std::memcpy(to + n * p.channels, &block.state[n], block.rows * sizeof(T));
  }
};

// The backward pass of a unit, last tile first. `state` of a block is the adjoint of the state
// that its tile hands on.
template <class T>
struct Backward : Unit<T> {
  using Unit<T>::p, Unit<T>::N, Unit<T>::M, Unit<T>::W, Unit<T>::pitch, Unit<T>::row, Unit<T>::blocks;
  using Unit<T>::u, Unit<T>::delta, Unit<T>::step, Unit<T>::z, Unit<T>::y, Unit<T>::g;
  using Unit<T>::num_blocks;
  Buffer<T> h;                         // M
  Buffer<T> decays, states;            // (steps, M)
  Buffer<T> sums_B, sums_C;            // (steps, pitch), over channels by lane
  Buffer<T> grad_u, grad_step;         // (steps)
  Buffer<T> grad_A[CHUNK / WIDTH<T>];  // M each
  Vec<T> grad_D[CHUNK / WIDTH<T>]{}, grad_bias[CHUNK / WIDTH<T>]{};

  Backward(const Problem& p, int64_t index) : Unit<T>(p, index) {
    h = buffer<T>(M);
    for (Buffer<T>* each : {&decays, &states}) *each = buffer<T>(p.steps * M);
    for (Buffer<T>* each : {&sums_B, &sums_C}) *each = buffer<T>(p.steps * pitch);
    for (Buffer<T>* each : {&grad_u, &grad_step}) *each = buffer<T>(p.steps);
    for (int j = 0; j < num_blocks; ++j) grad_A[j] = buffer<T>(M);
  }

  void backward() {
    for (int j = 0; j < num_blocks; ++j)
      gather<T>(p.grad_last, this->state_index(blocks[j]), blocks[j].rows, N,
                blocks[j].state.get());
    for (int64_t tile = (p.length - 1) / p.steps; tile >= 0; --tile) {
      const int64_t start = tile * p.steps;
      const int steps = static_cast<int>(std::min(p.steps, p.length - start));
      this->read_shared(start, steps);
      for (Buffer<T>* each : {&sums_B, &sums_C})
        std::fill(each->get(), each->get() + steps * pitch, Vec<T>{});
      for (int j = 0; j < num_blocks; ++j) block_backward(j, tile, start, steps);
      write_shared(sums_B.get(), start, steps, p.parts_B);
      write_shared(sums_C.get(), start, steps, p.parts_C);
    }
    for (int j = 0; j < num_blocks; ++j) {
      const int64_t at = this->state_index(blocks[j]);
      scatter<T>(blocks[j].state.get(), at, blocks[j].rows, N, p.grad_initial);
      scatter<T>(grad_A[j].get(), at, blocks[j].rows, N, p.parts_A);
      scatter<T>(&grad_D[j], at, blocks[j].rows, 1, p.parts_D);
      scatter<T>(&grad_bias[j], at, blocks[j].rows, 1, p.parts_bias);
    }
  }

  void block_backward(int j, int64_t tile, int64_t start, int steps) {
    Block<T>& block = blocks[j];
    const Piece at = this->piece(block, start, steps);
    this->read(block, start, steps);
    load<T>(p.grad_y, at, g.get());
    const T* first = this->kept(block, tile);
    for (int64_t n = 0; n < N; ++n)
      std::memcpy(&h[n], first + n * p.channels, block.rows * sizeof(T));
    this->template advance<true>(block, start, steps, h.get(), decays.get(), states.get());
    if (p.z.data) gate_backward(at, steps);
    for (int64_t n = 0; n < N; ++n)  // advance() left the tile's last state here
      std::memcpy(&h[n], first + n * p.channels, block.rows * sizeof(T));

    adjoint(block, steps, grad_A[j].get());

    const uint8_t* flag = this->flags(start);
    for (int t = 0; t < steps; ++t) {
      grad_D[j] += g[t] * u[t];
      if (flag && flag[t] == PADDING) grad_step[t] = Vec<T>{};
      if (p.delta_softplus) grad_step[t] *= softplus_slope(delta[t]);
      grad_bias[j] += grad_step[t];
    }
    store<T>(p.grad_u, at, grad_u.get());
    store<T>(p.grad_delta, at, grad_step.get());
  }

  // From the gradient of y to that of y before the gate, in place, and that of z.
  void gate_backward(const Piece& at, int steps) {
    for (int t = 0; t < steps; ++t) {
      const Vec<T> open = sigmoid(z[t]);
      const Vec<T> grad = g[t] * y[t] * open * (1 + z[t] * (1 - open));
      g[t] *= z[t] * open;
      z[t] = grad;
    }
    store<T>(p.grad_z, at, z.get());
  }

  // lam_t = C_t g_t + a_{t+1} lam_{t+1}, and from it all gradients but those of the gate.
  void adjoint(Block<T>& block, int steps, Vec<T>* __restrict__ grad_rates) {
    const Vec<T>* __restrict__ rates = block.rates.get();
    Vec<T>* __restrict__ later = block.state.get();
    for (int t = steps - 1; t >= 0; --t) {
      const T* b = reinterpret_cast<const T*>(this->B.get()) + t * pitch;
      const T* c = reinterpret_cast<const T*>(this->C.get()) + t * pitch;
      const Vec<T>* __restrict__ a = decays.get() + t * M;
      const Vec<T>* __restrict__ here = states.get() + t * M;
      const Vec<T>* __restrict__ before = t ? here - M : h.get();
      Vec<T>* __restrict__ sum_b = sums_B.get() + t * pitch;
      Vec<T>* __restrict__ sum_c = sums_C.get() + t * pitch;
      const Vec<T> size = step[t], input = size * u[t], grad = g[t];
      Vec<T> into{}, by_step{};
      for (int64_t n = 0; n < M; ++n) {
        const Vec<T> lam = c[n] * grad + later[n];
        later[n] = a[n] * lam;
        const Vec<T> exponent = later[n] * before[n];
        sum_c[n] += grad * here[n];
        sum_b[n] += lam * input;
        into += lam * b[n];
        by_step += exponent * rates[n];
        grad_rates[n] += exponent * size;
      }
      grad_u[t] = size * into + block.skip * grad;
      grad_step[t] = by_step * T(1 / LOG2E) + u[t] * into;
    }
  }

  void write_shared(const Vec<T>* sums, int64_t start, int steps, void* parts) const {
    const int64_t before = (this->chunk * p.batch + row) * p.groups + this->group;
    T* to = static_cast<T*>(parts) + (before * p.length + start) * N;
    for (int t = 0; t < steps; ++t)
      for (int64_t n = 0; n < N; n += W) {
        const Vec<T> sum = lane_sums<T>(sums + t * pitch + n);
        std::memcpy(to + t * N + n, &sum, std::min<int64_t>(W, N - n) * sizeof(T));
      }
  }
};

int64_t num_units(const Problem& p) {
  const int64_t width = p.channels / p.groups;
  return p.batch * p.groups * ((width + CHUNK - 1) / CHUNK);
}

template <class T>
void forward(const Problem& p) {
  const int64_t units = num_units(p);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t i = 0; i < units; ++i) Unit<T>(p, i).forward();
}

template <class T>
void backward(const Problem& p) {
  const int64_t units = num_units(p);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t i = 0; i < units; ++i) Backward<T>(p, i).backward();
}

}  // namespace

extern "C" {
int64_t chunk_channels() { return CHUNK; }
void forward32(const Problem* p) { forward<float>(*p); }
void forward64(const Problem* p) { forward<double>(*p); }
void backward32(const Problem* p) { backward<float>(*p); }
void backward64(const Problem* p) { backward<double>(*p); }
}
