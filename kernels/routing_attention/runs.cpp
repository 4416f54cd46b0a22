// Softmax attention of sorted queries over runs of sorted keys, forward and backward: the equations
// are those of triton.py.
//
// A block of queries walks over the keys from its first run to the end of its last, a block of keys
// at a time; blocks are gathered, queries by rows and keys also by columns, and multiplied in
// registers, the scale of the scores in the queries. The backward pass takes a line at a time, so
// that the gradients of its keys are summed in one order, whatever the number of threads.
//
// Also here is how runs come from groups (runs.py's make_runs) and from members of clusters, and how
// these are chosen.
#include <algorithm>
#include <limits>
#include <vector>

#include "products.h"
#include "ranks.h"

// Laid out as in cpp.py. q, k, v and what has their shape are rows of `width` numbers of one dtype;
// log_sum is in the dtype of sums.
extern "C" struct Problem {
  int64_t lines, queries, keys, width, dtype, last_resort, threads;
  double scale;
  const void *q, *k, *v;
  const int64_t *q_rows, *k_rows;    // (lines, queries), (lines, keys); null: in the order of lines
  const int32_t *low, *high, *own;   // (lines, queries)
  void *y, *log_sum;                 // rows like q's, a number for each
  const void* grad_y;                // these are for the backward pass only
  void *dq, *dk, *dv;
};

// What runs are made of, laid out as in cpp.py; -1 is what is not there. Either groups, of queries
// (B, queries, heads) and keys (B, keys, heads), lines being B * heads; or the members (lines, keys)
// of clusters and their queries (lines, queries), both ascending. The results are a Problem's; those
// of members have no rows.
extern "C" struct Sources {
  int64_t lines, heads, queries, keys, window, causal, threads;
  const int64_t *q_groups, *k_groups, *asking, *members;
  int64_t *q_rows, *k_rows;
  int32_t *low, *high, *own;
};

// The `slots` largest of each row of scores (rows, candidates), float or double, ascending against the
// right edge of index (rows, slots), and how many they are; -infinity is never taken.
extern "C" struct Choice {
  int64_t rows, candidates, slots, dtype, threads;
  const void* scores;
  int64_t *index, *taken;
};

namespace {

constexpr int64_t ABSENT = int64_t(1) << 62;  // sorts behind every group

// The runs of one line from its groups. Names, group * keys + position, are what is sorted, and all
// that a query asks of the sorted keys moves forward from query to query.
void runs_of_groups(const Sources& p, int64_t line) {
  const int64_t T = p.queries, S = p.keys, past = S - T, H = p.heads, b = line / H, h = line % H;
  std::vector<int64_t> keys(S), queries(T), place(S);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t group = p.k_groups[(b * S + s) * H + h];
    keys[s] = (group < 0 ? ABSENT : group * S) + s;
  }
  for (int64_t t = 0; t < T; ++t) {
    const int64_t group = p.q_groups[(b * T + t) * H + h];
    queries[t] = (group < 0 ? -S : group * S) + past + t;
  }
  std::sort(keys.begin(), keys.end());
  std::sort(queries.begin(), queries.end());
  for (int64_t j = 0; j < S; ++j) {
    const int64_t position = keys[j] < ABSENT ? keys[j] % S : keys[j] - ABSENT;
    place[position] = j;
    p.k_rows[line * S + j] = (b * S + position) * H + h;
  }
  int64_t start = 0, upto = 0, before = 0, close = 0;  // places that are not below a bound
  const auto advance = [&](int64_t& at, int64_t bound) {
    while (at < S && keys[at] < bound) ++at;
    return at;
  };
  for (int64_t i = 0; i < T; ++i) {
    const int64_t name = queries[i], group = (name + S) / S - 1, at = line * T + i;
    const int64_t position = name - group * S;
    p.q_rows[at] = (b * T + position - past) * H + h;
    p.own[at] = place[position];
    p.low[at] = p.high[at] = 0;
    if (group < 0) continue;
    const int64_t end = advance(upto, name + 1);
    p.low[at] = std::max(advance(start, group * S), end - p.window);
    p.high[at] = end;
    if (!p.causal)
      p.high[at] = std::min(advance(close, (group + 1) * S), advance(before, name) + p.window);
  }
}

// The runs of a cluster: its members as they stand, behind the empty slots in front.
void runs_of_members(const Sources& p, int64_t line) {
  const int64_t *members = p.members + line * p.keys, *asking = p.asking + line * p.queries;
  int64_t first = 0, upto = 0;
  while (first < p.keys && members[first] < 0) ++first;
  for (int64_t i = 0; i < p.queries; ++i) {
    const int64_t at = line * p.queries + i;
    p.low[at] = p.high[at] = first;
    p.own[at] = -1;
    if (asking[i] < 0) continue;
    while (upto < p.keys && members[upto] < asking[i]) ++upto;
    const bool found = upto < p.keys && members[upto] == asking[i];
    if (found) p.own[at] = upto;
    p.high[at] = p.causal ? std::max(first, upto + found) : p.keys;
  }
}

template <class T>
void choose(const Choice& p) {
  const Rank<T> nothing = rank_of(-std::numeric_limits<T>::infinity());
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Ranks<T> ranks;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      const T* scores = static_cast<const T*>(p.scores) + row * p.candidates;
      ranks.assign(p.candidates);
      for (int64_t i = 0; i < p.candidates; ++i) ranks[i] = rank_of(scores[i]);
      const int64_t count = std::min(p.slots, ranks.at_least(nothing + 1));
      int64_t* slot = p.index + row * p.slots;
      slot = std::fill_n(slot, p.slots - count, 0);
      ranks.largest(count, [&](int64_t i) { *slot++ = i; });
      p.taken[row] = count;
    }
  }
}

constexpr int64_t QUERIES = 16 * ROWS;  // of a block
template <class T>
constexpr int64_t KEYS = COLUMNS * WIDTH<T>;  // of a block

template <class T>
using Matrix = std::vector<Vec<T>>;

// What one query sees: the places low .. high without `hidden`, and apart from them `apart`, its own
// key's place; -1 for no such place.
struct Run {
  int64_t low, high, hidden, apart, row;

  bool meets(int64_t from, int64_t to) const { return low < to && from < high; }
};

template <class T, class In>
class Attention {
 public:
  explicit Attention(const Problem& p)
      : p_(p),
        V_(vectors_of<T>(p.width)),
        runs_(QUERIES),
        q_(QUERIES * V_),
        k_(KEYS<T> * V_),
        turned_k_(V_ * WIDTH<T> * COLUMNS),
        v_(KEYS<T> * V_),
        out_(QUERIES * V_),
        weights_(QUERIES * COLUMNS),
        other_(V_) {}

  void forward(int64_t line, int64_t first) {
    read_queries(line, first);
    std::fill(out_.begin(), out_.end(), Vec<T>{});
    std::vector<T> most(size_, -INFINITE);
    Matrix<T> total(size_);  // lane by lane
    for (int64_t i = 0; i < size_; ++i) {
      if (runs_[i].apart < 0) continue;
      const int64_t row = key_row(runs_[i].apart);
      load_row<T>(input(p_.k) + row * p_.width, p_.width, other_.data());
      most[i] = inner_product<T>(&q_[i * V_], other_.data(), V_);
      total[i][0] = 1;
      load_row<T>(input(p_.v) + row * p_.width, p_.width, &out_[i * V_]);
    }
    for (int64_t from = walk_from_; from < walk_to_; from += KEYS<T>) {
      read_keys(from, p_.k, k_);
      turn<T>(k_.data(), V_, COLUMNS, turned_k_.data());
      read_keys(from, p_.v, v_);
      for (int64_t i = 0; i < size_; i += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, size_ - i);
        if (!strip_meets(i, rows, from)) continue;
        scores(q_, turned_k_, i, rows, weights_);
        for (int64_t r = i; r < i + rows; ++r) soften(r, from, most[r], total[r]);
        product<T, true>(numbers(weights_) + i * KEYS<T>, KEYS<T>, 1, v_.data(), V_, &out_[i * V_],
                         V_, rows, V_, std::min(KEYS<T>, walk_to_ - from));
      }
    }
    for (int64_t i = 0; i < size_; ++i) {
      const T sum = lane_sum<T>(total[i]);
      const int64_t row = runs_[i].row;
      store_row<T>(&out_[i * V_], p_.width, output(p_.y) + row * p_.width, sum == 0 ? T(0) : 1 / sum);
      static_cast<T*>(p_.log_sum)[row] = sum == 0 ? 0 : most[i] + std::log(sum);
    }
  }

  void backward(int64_t line) {
    g_.resize(QUERIES * V_);
    turned_v_.resize(V_ * WIDTH<T> * COLUMNS);
    slopes_.resize(QUERIES * COLUMNS);
    dk_.assign((p_.keys + KEYS<T>) * V_, Vec<T>{});  // the last block may be wider than the rest
    dv_.assign((p_.keys + KEYS<T>) * V_, Vec<T>{});
    for (int64_t first = 0; first < p_.queries; first += QUERIES) backward_block(line, first);
    for (int64_t place = 0; place < p_.keys; ++place) {
      const int64_t row = key_row(place) * p_.width;
      store_row<T>(&dk_[place * V_], p_.width, output(p_.dk) + row);
      store_row<T>(&dv_[place * V_], p_.width, output(p_.dv) + row);
    }
  }

 private:
  static constexpr T INFINITE = std::numeric_limits<T>::infinity();

  static const T* numbers(const Matrix<T>& x) { return reinterpret_cast<const T*>(x.data()); }
  const In* input(const void* x) const { return static_cast<const In*>(x); }
  In* output(void* x) const { return static_cast<In*>(x); }
  int64_t key_row(int64_t place) const {
    const int64_t at = line_ * p_.keys + place;
    return p_.k_rows ? p_.k_rows[at] : at;
  }

  void read_queries(int64_t line, int64_t first) {
    line_ = line;
    size_ = std::min(QUERIES, p_.queries - first);
    walk_from_ = p_.keys;
    walk_to_ = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t at = line * p_.queries + first + i, own = p_.own[at];
      const int64_t low = p_.low[at], high = std::max<int64_t>(low, p_.high[at]);
      const bool inside = low <= own && own < high;
      const bool counts = own >= 0 && (!p_.last_resort || high - low == inside);
      runs_[i] = {low, high, inside && !counts ? own : -1, counts && !inside ? own : -1,
                  p_.q_rows ? p_.q_rows[at] : at};
      if (low < high) {
        walk_from_ = std::min(walk_from_, low);
        walk_to_ = std::max(walk_to_, high);
      }
      load_row<T>(input(p_.q) + runs_[i].row * p_.width, p_.width, &q_[i * V_], T(p_.scale));
    }
  }

  void read_keys(int64_t from, const void* x, Matrix<T>& to) {
    const int64_t there = std::min(KEYS<T>, walk_to_ - from);
    for (int64_t j = 0; j < there; ++j)
      load_row<T>(input(x) + key_row(from + j) * p_.width, p_.width, &to[j * V_]);
    std::fill(to.begin() + there * V_, to.end(), Vec<T>{});
  }

  bool strip_meets(int64_t i, int64_t rows, int64_t from) const {
    for (int64_t r = i; r < i + rows; ++r)
      if (runs_[r].meets(from, from + KEYS<T>)) return true;
    return false;
  }

  // out (rows, KEYS) = x's rows from i on times the turned keys or values.
  void scores(Matrix<T>& x, const Matrix<T>& turned, int64_t i, int64_t rows, Matrix<T>& out) {
    product<T, false>(numbers(x) + i * V_ * WIDTH<T>, V_ * WIDTH<T>, 1, turned.data(), COLUMNS,
                      &out[i * COLUMNS], COLUMNS, rows, COLUMNS, p_.width);
  }

  // Scores of the keys that query r does not see become -infinity.
  void mask(int64_t r, int64_t from, Vec<T>* scores) const {
    const Run& run = runs_[r];
    if (run.low <= from && from + KEYS<T> <= run.high && run.hidden < 0) return;
    using I = typename Simd<T>::I;
    for (int j = 0; j < COLUMNS; ++j) {
      const I place = counting_from<T>(from + j * WIDTH<T>);
      const I seen = (place >= all<I>(run.low)) & (place < all<I>(run.high)) & (place != all<I>(run.hidden));
      scores[j] = seen ? scores[j] : all<Vec<T>>(-INFINITE);
    }
  }

  // Scores of query r become weights relative to the largest score so far.
  void soften(int64_t r, int64_t from, T& most, Vec<T>& total) {
    Vec<T>* x = &weights_[r * COLUMNS];
    mask(r, from, x);
    Vec<T> top = x[0];
    for (int j = 1; j < COLUMNS; ++j) top = x[j] > top ? x[j] : top;
    const T higher = std::max(most, lane_max<T>(top));
    if (higher > most) {
      const T shrink = std::exp(most - higher);
      total *= shrink;
      for (int64_t j = 0; j < V_; ++j) out_[r * V_ + j] *= shrink;
      most = higher;
    }
    weigh(x, most == -INFINITE ? 0 : most);  // where no score is a number, what is NaN shall stay
    for (int j = 0; j < COLUMNS; ++j) total += x[j];
  }

  // Scores become the exponentials of what they are above `level`.
  static void weigh(Vec<T>* x, T level) {
    for (int j = 0; j < COLUMNS; ++j) x[j] -= level;
    exp_all<COLUMNS>(x);
  }

  void backward_block(int64_t line, int64_t first) {
    read_queries(line, first);
    std::fill(out_.begin(), out_.end(), Vec<T>{});  // the gradient of the queries
    std::vector<T> mean(size_), sum(size_);
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t row = runs_[i].row;
      load_row<T>(input(p_.grad_y) + row * p_.width, p_.width, &g_[i * V_]);
      load_row<T>(input(p_.y) + row * p_.width, p_.width, other_.data());
      mean[i] = inner_product<T>(&g_[i * V_], other_.data(), V_);
      sum[i] = static_cast<const T*>(p_.log_sum)[row];
      if (runs_[i].apart >= 0) backward_apart(i, mean[i], sum[i]);
    }
    for (int64_t from = walk_from_; from < walk_to_; from += KEYS<T>) {
      read_keys(from, p_.v, v_);
      turn<T>(v_.data(), V_, COLUMNS, turned_v_.data());
      read_keys(from, p_.k, k_);
      turn<T>(k_.data(), V_, COLUMNS, turned_k_.data());
      int64_t begin = size_, end = 0;  // of the queries that see any of these keys
      for (int64_t i = 0; i < size_; i += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, size_ - i);
        if (!strip_meets(i, rows, from)) {
          std::fill_n(&weights_[i * COLUMNS], rows * COLUMNS, Vec<T>{});
          std::fill_n(&slopes_[i * COLUMNS], rows * COLUMNS, Vec<T>{});
          continue;
        }
        begin = std::min(begin, i);
        end = i + rows;
        scores(q_, turned_k_, i, rows, weights_);
        scores(g_, turned_v_, i, rows, slopes_);
        for (int64_t r = i; r < i + rows; ++r) {
          Vec<T>*x = &weights_[r * COLUMNS], *slope = &slopes_[r * COLUMNS];
          mask(r, from, x);
          weigh(x, sum[r]);
          for (int j = 0; j < COLUMNS; ++j) slope[j] = x[j] * (slope[j] - mean[r]);
        }
        product<T, true>(numbers(slopes_) + i * KEYS<T>, KEYS<T>, 1, k_.data(), V_, &out_[i * V_], V_,
                         rows, V_, KEYS<T>);
      }
      if (begin >= end) continue;
      const int64_t there = std::min(KEYS<T>, walk_to_ - from);
      product<T, true>(numbers(weights_) + begin * KEYS<T>, 1, KEYS<T>, &g_[begin * V_], V_,
                       &dv_[from * V_], V_, there, V_, end - begin);
      product<T, true>(numbers(slopes_) + begin * KEYS<T>, 1, KEYS<T>, &q_[begin * V_], V_,
                       &dk_[from * V_], V_, there, V_, end - begin);
    }
    for (int64_t i = 0; i < size_; ++i)
      store_row<T>(&out_[i * V_], p_.width, output(p_.dq) + runs_[i].row * p_.width, T(p_.scale));
  }

  // What a query's own key, apart from its run, gives and gets.
  void backward_apart(int64_t i, T mean, T sum) {
    const int64_t place = runs_[i].apart, row = key_row(place) * p_.width;
    load_row<T>(input(p_.v) + row, p_.width, other_.data());
    T slope = inner_product<T>(&g_[i * V_], other_.data(), V_) - mean;
    load_row<T>(input(p_.k) + row, p_.width, other_.data());
    const T weight = std::exp(inner_product<T>(&q_[i * V_], other_.data(), V_) - sum);
    slope *= weight;
    for (int64_t j = 0; j < V_; ++j) {
      out_[i * V_ + j] += slope * other_[j];
      dk_[place * V_ + j] += slope * q_[i * V_ + j];
      dv_[place * V_ + j] += weight * g_[i * V_ + j];
    }
  }

  const Problem& p_;
  const int64_t V_;  // vectors of a row
  int64_t line_ = 0, size_ = 0, walk_from_ = 0, walk_to_ = 0;
  std::vector<Run> runs_;
  Matrix<T> q_, k_, turned_k_, v_, out_, weights_, other_;
  Matrix<T> g_, turned_v_, slopes_, dk_, dv_;
};

template <class T, class In>
void forward(const Problem& p) {
  const int64_t blocks = (p.queries + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Attention<T, In> attention(p);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.lines * blocks; ++i) attention.forward(i / blocks, i % blocks * QUERIES);
  }
}

template <class T, class In>
void backward(const Problem& p) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Attention<T, In> attention(p);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.lines; ++i) attention.backward(i);
  }
}

}  // namespace

extern "C" {
void make_runs(const Sources* p) {
#pragma omp parallel for schedule(dynamic) num_threads(p->threads) if (p->threads > 1)
  for (int64_t line = 0; line < p->lines; ++line)
    p->members ? runs_of_members(*p, line) : runs_of_groups(*p, line);
}
void choose_members(const Choice* p) {
  p->dtype == FLOAT64 ? choose<double>(*p) : choose<float>(*p);
}
void attend(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto x) { forward<decltype(sum), decltype(x)>(*p); });
}
void differentiate(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto x) { backward<decltype(sum), decltype(x)>(*p); });
}
}
