// A few more positions of one or several sequences through the blocks of a Llama stack, and the logits behind them.
//
// Generation is moving weights: here every weight is read once per call, in the order in which it lies in memory, with
// hardly anything in between. Built and called by native_stack.py. Letters: R rows, D width, H heads,
// G key/value heads, S positions in a cache, d = D / H.
#include <unistd.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST_ROWS = 4;  // floats in a register; rows whose sums, four of each, fit in all registers
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST_ROWS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, MOST_ROWS = 4;
#else
constexpr int LANES = 4, MOST_ROWS = 2;
#endif
constexpr int PANEL = 4 * LANES;  // outputs that are computed at once
constexpr int HALF = PANEL / 2;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

// --- numbers --------------------------------------------------------------------------------------------------------

template <class V, class P>
inline V load(const P* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The weights of a panel for one input
inline void unpack(const float* p, Floats (&w)[4]) {
    for (int k = 0; k < 4; ++k) w[k] = load<Floats>(p + LANES * k);
}

inline void unpack(const BFloat16* p, Floats (&w)[4]) {  // the outputs of a register side by side with the next one's
    for (int k = 0; k < 2; ++k) {
        Bits pairs = load<Bits>(p + 2 * LANES * k);
        w[2 * k] = (Floats)(pairs << 16);
        w[2 * k + 1] = (Floats)(pairs & 0xffff0000u);
    }
}

// Sums of two neighbouring products of 16 bits.
inline Ints multiply_pairs(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

inline float sum(Floats v) {
    float all = 0;
    for (int i = 0; i < LANES; ++i) all += v[i];
    return all;
}

inline float number(float x) { return x; }

inline Floats numbers(const float* p) { return load<Floats>(p); }

inline Floats numbers(const BFloat16* p) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    return (Floats)(__builtin_convertvector(load<Halves>(p), Bits) << 16);
}

inline float number(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* p, float x) { *p = x; }

inline void store(BFloat16* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    p->bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even; x is finite
}

template <class C>
inline float dot(const float* a, const C* b, int n) {
    Floats sums{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) sums += load<Floats>(a + i) * numbers(b + i);
    float all = sum(sums);
    for (; i < n; ++i) all += a[i] * number(b[i]);
    return all;
}

// exp to 2 units in the last place, by 2^n times a polynomial, in a form that compilers make vectors of
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

// --- threads --------------------------------------------------------------------------------------------------------

inline void wait_a_little(int& turns) {
    if (++turns < 4096) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    } else {
        std::this_thread::yield();
    }
}

// Threads that take part in one job at a time; idle ones look for the next for a moment, then sleep.
class Team {
   public:
    // How many of so many threads there are: a system may give no more.
    int gather(int threads) {
        try {
            while (helpers_ < threads - 1) {
                std::thread(&Team::help, this, helpers_ + 1, round_.load()).detach();
                ++helpers_;
            }
        } catch (const std::system_error&) {
        }
        return std::min(threads, helpers_ + 1);
    }

    void work(int threads, const std::function<void(int)>& job) {
        threads_ = threads;
        if (threads == 1) return job(0);
        job_ = &job;
        left_.store(helpers_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            round_.fetch_add(1);
        }
        woken_.notify_all();
        job(0);
        for (int turns = 0; left_.load(std::memory_order_acquire);) wait_a_little(turns);
    }

    // All threads of the job have come here before any goes on.
    void meet() {
        if (threads_ == 1) return;
        uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            for (int turns = 0; phase_.load(std::memory_order_acquire) == phase;) wait_a_little(turns);
        }
    }

   private:
    void help(int index, uint32_t seen) {
        for (;; ++seen) {
            for (int turns = 0; turns < 8192 && round_.load(std::memory_order_acquire) == seen;) wait_a_little(turns);
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                woken_.wait(lock, [&] { return round_.load() != seen; });
            }
            if (index < threads_) (*job_)(index);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    int helpers_ = 0, threads_ = 1;
    const std::function<void(int)>* job_ = nullptr;
    std::atomic<uint32_t> round_{0}, phase_{0};
    std::atomic<int> left_{0}, arrived_{0};
    std::mutex mutex_;
    std::condition_variable woken_;
};

// --- products -------------------------------------------------------------------------------------------------------

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8 };

}  // namespace

extern "C" {

// (out, in), in panels of outputs, each (in, PANEL); the last one is filled up with zeros.
struct Matrix {
    const void* weights;
    const float* scales;  // of each output, for INT8
    int32_t out, in, kind;
};

struct Block {
    Matrix qkv, out, gate_up, down;  // gate_up: of each panel one half is of the gate, the other of the rest
};

struct Stack {
    const Block* blocks;
    int32_t d_model, n_heads, n_kv_heads, d_head, d_ff;
    float least;  // added to the sum of squares of a row
};

// A sequence in its cache: keys, then values, (2 G, S, d) of each layer.
struct Sequence {
    void* cache;
    int64_t per_layer, per_head;  // numbers from one to the next
    int32_t length, rows;  // positions filled, and to come
};

}  // extern "C"

namespace {

// Rows of inputs, as products with weights of a kind take them.
struct Rows {
    const float* x;
    int stride, in;

    template <class W, int R>
    void multiply(const W* w, int first, Floats (&sums)[R][4]) const {
        const float* own = x + int64_t(first) * stride;
        for (int i = 0; i < in; ++i, w += PANEL) {
            Floats weights[4];
            unpack(w, weights);
            for (int r = 0; r < R; ++r)
                for (int k = 0; k < 4; ++k) sums[r][k] += weights[k] * own[r * stride + i];
        }
    }
};

// For weights of 8 bits: whole numbers of 13 bits and a factor for each row, two inputs side by side.
struct Whole {
    static constexpr float MOST = 4096;
    static constexpr int EXACT = 2048;  // pairs whose products cannot overflow 32 bits: 2 * 127 * 4096 each
    std::vector<int16_t> numbers;
    std::vector<float> factors;
    int stride;  // pairs in a row

    Whole(const Rows& from, int rows) : numbers(size_t(rows) * (from.in + from.in % 2)), factors(rows) {
        stride = (from.in + 1) / 2;
        for (int r = 0; r < rows; ++r) {
            const float* x = from.x + int64_t(r) * from.stride;
            float most = 1e-30f;
            for (int i = 0; i < from.in; ++i) most = std::max(most, std::fabs(x[i]));
            factors[r] = most / MOST;
            int16_t* whole = &numbers[size_t(r) * 2 * stride];
            for (int i = 0; i < from.in; ++i) whole[i] = int16_t(std::floor(x[i] * (MOST / most) + 0.5f));
        }
    }

    template <class W, int R>
    void multiply(const W* w, int first, Floats (&sums)[R][4]) const {
        const int16_t* own = &numbers[size_t(first) * 2 * stride];
        for (int begin = 0; begin < stride; begin += EXACT) {
            Ints part[R][4] = {};
            for (int i = begin; i < std::min(begin + EXACT, stride); ++i, w += 2 * PANEL) {
                Shorts weights[4];  // of two inputs; the outputs of a register side by side with the next one's
                for (int k = 0; k < 2; ++k) {
                    Shorts both = load<Shorts>(w + PANEL * k);
                    weights[2 * k] = both << 8 >> 8;
                    weights[2 * k + 1] = both >> 8;
                }
                for (int r = 0; r < R; ++r) {
                    Shorts inputs = (Shorts)(Ints{} + load<int32_t>(own + 2 * (int64_t(r) * stride + i)));
                    for (int k = 0; k < 4; ++k) part[r][k] += multiply_pairs(weights[k], inputs);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int k = 0; k < 4; ++k) sums[r][k] += __builtin_convertvector(part[r][k], Floats);
        }
        for (int r = 0; r < R; ++r)
            for (Floats& sum : sums[r]) sum *= factors[first + r];
    }
};

template <class W, int R, class X, class Take>
void rows_of_panel(const Matrix& m, int panel, const X& x, int first, const Take& take) {
    Floats sums[R][4] = {};
    int64_t inputs = sizeof(W) == 1 ? m.in + m.in % 2 : m.in;
    x.template multiply<W, R>((const W*)m.weights + panel * inputs * PANEL, first, sums);
    for (int r = 0; r < R; ++r) {
        if (m.scales)
            for (int k = 0; k < 4; ++k) sums[r][k] *= load<Floats>(m.scales + panel * PANEL + LANES * k);
        float values[PANEL];
        memcpy(values, sums[r], sizeof values);
        take(first + r, panel, values);
    }
}

template <class W, class X, class Take>
void panels(const Matrix& m, const X& x, int rows, int from, int to, const Take& take) {
    for (int panel = from; panel < to; ++panel) {
        int r = 0;  // the sums of a row are the same in whatever company it comes
        for (; r + MOST_ROWS <= rows; r += MOST_ROWS) rows_of_panel<W, MOST_ROWS>(m, panel, x, r, take);
        for (; r + 2 <= rows; r += 2) rows_of_panel<W, 2>(m, panel, x, r, take);
        for (; r < rows; ++r) rows_of_panel<W, 1>(m, panel, x, r, take);
    }
}

// Share `part` of `parts` of the product of (rows, in) with m; `take` is given row, panel and its outputs.
template <class Take>
void product(const Matrix& m, const float* x, int stride, int rows, int part, int parts, const Take& take) {
    int all = (m.out + PANEL - 1) / PANEL, from = all * part / parts, to = all * (part + 1) / parts;
    Rows given{x, stride, m.in};
    if (from == to) return;
    if (m.kind == INT8) panels<int8_t>(m, Whole(given, rows), rows, from, to, take);
    if (m.kind == BFLOAT16) panels<BFloat16>(m, given, rows, from, to, take);
    if (m.kind == FLOAT32) panels<float>(m, given, rows, from, to, take);
}

// RMSNorm without its scale and divided by sqrt(D), which both lie in the matrices.
void direction(const float* x, int D, float least, float* y) {
    float factor = 1 / std::sqrt(dot(x, x, D) + least);
    for (int i = 0; i < D; ++i) y[i] = x[i] * factor;
}

// --- attention ------------------------------------------------------------------------------------------------------

// Channel i is turned with i + d / 2; `turns` are d / 2 cosines, then as many sines.
void turn(float* x, const float* turns, int d) {
    int half = d / 2;
    for (int i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * turns[i] - b * turns[i + half];
        x[i + half] = b * turns[i] + a * turns[i + half];
    }
}

// The rows of one sequence for one key/value head, which come into its cache; H / G heads of `heard` are written.
template <class C>
void attend(const Stack& s, const Sequence& sequence, int layer, int g, float* qkv, int wide, const float* turns,
            float* heard, std::vector<float>& scores) {
    int d = s.d_head, share = s.n_heads / s.n_kv_heads;
    C* keys = (C*)sequence.cache + layer * sequence.per_layer + g * sequence.per_head;
    C* values = keys + s.n_kv_heads * sequence.per_head;
    for (int t = 0; t < sequence.rows; ++t, qkv += wide, turns += d, heard += s.n_heads * d) {
        int at = sequence.length + t;
        float* key = qkv + (s.n_heads + g) * d;
        turn(key, turns, d);
        for (int i = 0; i < d; ++i) {
            store(keys + int64_t(at) * d + i, key[i]);
            store(values + int64_t(at) * d + i, key[s.n_kv_heads * d + i]);
        }
        scores.resize(at + 1);
        for (int h = g * share; h < (g + 1) * share; ++h) {
            float *q = qkv + h * d, *out = heard + h * d, most = -INFINITY, sum = 0;
            turn(q, turns, d);
            for (int j = 0; j <= at; ++j) {
                const C* k = keys + int64_t(j) * d;
                scores[j] = dot(q, k, d);
                most = std::max(most, scores[j]);
            }
            for (int j = 0; j <= at; ++j) sum += scores[j] = exponential(scores[j] - most);
            for (int i = 0; i < d; ++i) out[i] = 0;
            for (int j = 0; j <= at; ++j) {
                const C* v = values + int64_t(j) * d;
                float weight = scores[j] / sum;
                for (int i = 0; i < d; ++i) out[i] += weight * number(v[i]);
            }
        }
    }
}

// --- a stack --------------------------------------------------------------------------------------------------------

struct Buffers {
    std::vector<float> qkv, heard, active;
};

class Call {
   public:
    Call(Team& team, int threads, const Stack& stack, Buffers& b, Sequence* sequences, int n, const float* turns,
         int64_t turns_between, bool bf16, float* x)
        : team(team), parts(threads), s(stack), b(b), sequences(sequences), n(n), turns(turns),
          turns_between(turns_between), bf16(bf16), x(x) {
        for (int i = 0; i < n; ++i) rows += sequences[i].rows;
        wide = (s.n_heads + 2 * s.n_kv_heads) * s.d_head;
        b.qkv.resize(size_t(rows) * wide);
        b.heard.resize(size_t(rows) * s.n_heads * s.d_head);
        b.active.resize(size_t(rows) * s.d_ff);
    }

   private:
    auto add() const {
        return [this](int r, int p, const float* y) {
            float* row = x + int64_t(r) * s.d_model;
            for (int i = p * PANEL; i < std::min((p + 1) * PANEL, int(s.d_model)); ++i) row[i] += y[i - p * PANEL];
        };
    }

   public:
    void blocks(int part, int first, int last) const {
        std::vector<float> normed(size_t(rows) * s.d_model), scores;
        for (int layer = first; layer < last; ++layer) {
            const Block& block = s.blocks[layer];
            directions(normed);
            product(block.qkv, normed.data(), s.d_model, rows, part, parts, [&](int r, int p, const float* y) {
                copy(y, &b.qkv[size_t(r) * wide], p * PANEL, PANEL, wide);
            });
            team.meet();
            for (int unit = part; unit < n * s.n_kv_heads; unit += parts) attention(layer, unit, scores);
            team.meet();
            product(block.out, b.heard.data(), block.out.in, rows, part, parts, add());
            team.meet();
            directions(normed);
            product(block.gate_up, normed.data(), s.d_model, rows, part, parts, [&](int r, int p, const float* y) {
                float gated[HALF];
                for (int i = 0; i < HALF; ++i) gated[i] = y[i] / (1 + exponential(-y[i])) * y[HALF + i];
                copy(gated, &b.active[size_t(r) * s.d_ff], p * HALF, HALF, s.d_ff);
            });
            team.meet();
            product(block.down, b.active.data(), s.d_ff, rows, part, parts, add());
            team.meet();
        }
    }

    // Logits (n, out) of the last row of each sequence.
    void logits(int part, const Matrix& head, float* out) const {
        std::vector<float> normed(size_t(n) * s.d_model);
        for (int i = 0, r = 0; i < n; ++i) {
            r += sequences[i].rows;
            direction(x + int64_t(r - 1) * s.d_model, s.d_model, s.least, &normed[size_t(i) * s.d_model]);
        }
        product(head, normed.data(), s.d_model, n, part, parts, [&](int r, int p, const float* y) {
            copy(y, out + int64_t(r) * head.out, p * PANEL, PANEL, head.out);
        });
    }

   private:
    static void copy(const float* from, float* row, int at, int size, int end) {
        if (at < end) memcpy(row + at, from, sizeof(float) * std::min(size, end - at));
    }

    void directions(std::vector<float>& normed) const {
        for (int r = 0; r < rows; ++r)
            direction(x + int64_t(r) * s.d_model, s.d_model, s.least, &normed[size_t(r) * s.d_model]);
    }

    void attention(int layer, int unit, std::vector<float>& scores) const {
        int i = unit / s.n_kv_heads, g = unit % s.n_kv_heads, first = 0;
        for (int j = 0; j < i; ++j) first += sequences[j].rows;
        float *qkv = &b.qkv[size_t(first) * wide], *heard = &b.heard[size_t(first) * s.n_heads * s.d_head];
        const float* own = turns + i * turns_between;
        if (bf16)
            attend<BFloat16>(s, sequences[i], layer, g, qkv, wide, own, heard, scores);
        else
            attend<float>(s, sequences[i], layer, g, qkv, wide, own, heard, scores);
    }

    Team& team;
    int parts;
    const Stack& s;
    Buffers& b;
    Sequence* sequences;
    int n;
    const float* turns;
    int64_t turns_between;  // numbers from a sequence's first row to the next one's; 0: all have the same
    bool bf16;
    float* x;
    int rows = 0, wide = 0;
};

// --- one call at a time ---------------------------------------------------------------------------------------------

struct Shop {
    const pid_t owner = getpid();
    std::mutex one_at_a_time;
    Team team;
    Buffers buffers;
};

// That of this process: a forked one has none of the threads, and perhaps a lock that nobody will open. Never destroyed,
// as threads use it until the process ends.
Shop& shop_of_process() {
    static std::atomic<Shop*> current{nullptr};
    Shop* found = current.load();
    while (!found || found->owner != getpid()) {
        Shop* made = new Shop();
        if (current.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

}  // namespace

extern "C" int32_t lanes() { return LANES; }

// Blocks first .. last - 1 on (R, D) x, in place, of n sequences, whose lengths grow where the `last` block is the
// stack's last; then, if there is a head, (n, out) logits.
extern "C" void step(const Stack* stack, int32_t first, int32_t last, int32_t ends, float* x, Sequence* sequences,
                     int32_t n, const float* turns, int64_t turns_between, int32_t bf16, const Matrix* head,
                     float* logits, int32_t threads) {
    Shop& shop = shop_of_process();
    std::lock_guard<std::mutex> lock(shop.one_at_a_time);
    threads = shop.team.gather(threads);
    Call call(shop.team, threads, *stack, shop.buffers, sequences, n, turns, turns_between, bf16, x);
    shop.team.work(threads, [&](int part) {
        call.blocks(part, first, last);
        if (head) call.logits(part, *head, logits);
    });
    if (ends)
        for (int i = 0; i < n; ++i) sequences[i].length += sequences[i].rows;
}
