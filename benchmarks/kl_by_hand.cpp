// Forward KL and its gradient in the logits, written by hand: what a compiled step could take.
//
//     g++ -O3 -march=native benchmarks/kl_by_hand.cpp -o kl_by_hand && ./kl_by_hand 32000 9
//
// Needs AVX-512. Medians and minima of CPU time, in ns for an element of both sides' logits:
// a pass that reads both and writes one; the four passes over every row of them; the same four
// passes over one row in the cache, which leaves arithmetic. As rkl's: normalised by their
// maxima, with the series near p = q, and q sum(slope) taken off. Infinities are not looked at.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

static __m512 all(float x) { return _mm512_set1_ps(x); }
static __m512 at(const float* x) { return _mm512_loadu_ps(x); }

static __m512 exponential(__m512 x) {  // to about 1 ulp
  x = _mm512_max_ps(x, all(-100));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, all(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, all(1.42860677e-6f), r);
  __m512 sum = all(1.98527618e-4f);
  for (float c : {1.39304355e-3f, 8.33336078e-3f, 4.16664854e-2f, 1 / 6.f, 0.5f})
    sum = _mm512_fmadd_ps(sum, r, all(c));
  sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(r, r), _mm512_add_ps(r, all(1)));
  return _mm512_scalef_ps(sum, n);
}

static float step(const float* a, const float* b, float* out, float* slope, float* q, long vocab) {
  __m512 max_a = all(-INFINITY), max_b = max_a, sum_a = all(0), sum_b = all(0);
  for (long i = 0; i < vocab; i += 16) {
    max_a = _mm512_max_ps(max_a, at(a + i));
    max_b = _mm512_max_ps(max_b, at(b + i));
  }
  max_a = all(_mm512_reduce_max_ps(max_a)), max_b = all(_mm512_reduce_max_ps(max_b));
  for (long i = 0; i < vocab; i += 16) {
    sum_a = _mm512_add_ps(sum_a, exponential(_mm512_sub_ps(at(a + i), max_a)));
    sum_b = _mm512_add_ps(sum_b, exponential(_mm512_sub_ps(at(b + i), max_b)));
  }
  __m512 log_a = all(std::log(_mm512_reduce_add_ps(sum_a)));
  __m512 log_b = all(std::log(_mm512_reduce_add_ps(sum_b)));
  __m512 value = all(0), total = all(0);
  for (long i = 0; i < vocab; i += 16) {
    __m512 logp = _mm512_sub_ps(_mm512_sub_ps(at(a + i), max_a), log_a);
    __m512 logq = _mm512_sub_ps(_mm512_sub_ps(at(b + i), max_b), log_b);
    __m512 p = exponential(logp), mass = exponential(logq), t = _mm512_sub_ps(logp, logq);
    __mmask16 near = _mm512_cmp_ps_mask(_mm512_abs_ps(t), all(0.02f), _CMP_LT_OQ);
    __m512 series = _mm512_fmadd_ps(t, all(1 / 30.f), all(0.125f));
    series = _mm512_fmadd_ps(t, series, all(1 / 3.f));
    series = _mm512_fmadd_ps(t, series, all(0.5f));
    __m512 excess = _mm512_fmsub_ps(p, t, _mm512_sub_ps(p, mass));
    excess = _mm512_mask_mul_ps(excess, near, mass, _mm512_mul_ps(series, _mm512_mul_ps(t, t)));
    __m512 pull = _mm512_sub_ps(mass, p);
    value = _mm512_add_ps(value, excess), total = _mm512_add_ps(total, pull);
    _mm512_storeu_ps(slope + i, pull), _mm512_storeu_ps(q + i, mass);
  }
  total = all(_mm512_reduce_add_ps(total));
  for (long i = 0; i < vocab; i += 16) {
    __m512 gradient = _mm512_fnmadd_ps(at(q + i), total, at(slope + i));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(all(1 / 1024.f), gradient));
  }
  return _mm512_reduce_add_ps(value);
}

static double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

static void print(const char* name, std::vector<double> seconds, long elements) {
  std::sort(seconds.begin(), seconds.end());
  std::printf("%s: median %.2f, minimum %.2f ns\n", name,
              seconds[seconds.size() / 2] * 1e9 / elements, seconds[0] * 1e9 / elements);
}

int main(int, char** argument) {
  long vocab = std::atol(argument[1]) / 16 * 16, tokens = (1L << 24) / vocab;
  long elements = vocab * tokens;
  std::vector<float> a(elements), b(elements), kept(elements), slope(vocab), q(vocab), out(vocab);
  for (long i = 0; i < elements; i++) {
    a[i] = 16 * (std::rand() / float(RAND_MAX)) - 8;
    kept[i] = a[i] + 4 * (std::rand() / float(RAND_MAX)) - 2;
  }
  std::vector<double> memory, whole, cached;
  float sum = 0;
  for (int repeat = std::atoi(argument[2]); repeat; repeat--) {
    b = kept;
    double start = cpu_seconds();
    for (long i = 0; i < elements; i += 16)
      _mm512_storeu_ps(&b[i], _mm512_sub_ps(at(&b[i]), at(&a[i])));
    memory.push_back(cpu_seconds() - start);
    b = kept;
    start = cpu_seconds();
    for (long i = 0; i < elements; i += vocab)
      sum += step(&a[i], &b[i], &b[i], slope.data(), q.data(), vocab);
    whole.push_back(cpu_seconds() - start);
    start = cpu_seconds();
    for (long i = 0; i < elements; i += vocab)
      sum += step(&a[0], &kept[0], out.data(), slope.data(), q.data(), vocab);
    cached.push_back(cpu_seconds() - start);
  }
  print("read both, write one", memory, elements);
  print("the whole step", whole, elements);
  print("the step on one row in the cache", cached, elements);
  std::printf("(sum %g)\n", sum);
}
