// Makes views of random frames from random tables: `fuzz FILE [RUNS]`, built by tools/sanitize.sh.
//
// Frames and views are allocated with exactly their size, so that sanitizers detect any overrun.
// The first run writes its views to FILE; later runs, which may be built for another processor,
// compare theirs with it.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "pool.h"
#include "augment/views.h"

using namespace sslus::augment;

namespace {

std::mt19937 generator(1);

double uniform(double low, double high) {  // not std::uniform_...: it differs between libraries
  return low + (high - low) * (generator() / 4294967296.0);
}

int64_t whole(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(uniform(0, static_cast<double>(high - low + 1)));
}

bool chance(double p) { return uniform(0, 1) < p; }

// Half of all values are neutral; a sixth each are the lowest, the highest, and random in between.
float pick(double neutral, double low, double high) {
  if (chance(0.5)) return static_cast<float>(neutral);
  return static_cast<float>(chance(0.33) ? low : chance(0.5) ? high : uniform(low, high));
}

void fill(float* p, double side) {
  for (int axis = 0; axis < 2; ++axis) {
    double length = std::max(1.0, chance(0.3) ? side : chance(0.2) ? 1 : uniform(1, side));
    double start = chance(0.2) ? 0 : chance(0.2) ? side - length : uniform(0, side - length);
    if (chance(0.5)) length = std::floor(length), start = std::floor(start);
    p[kTop + axis] = static_cast<float>(start);
    p[kHeight + axis] = static_cast<float>(length);
  }
  p[kFlip] = chance(0.5);
  p[kBrightness] = pick(1, 0, 3);
  p[kContrast] = pick(1, 0, 3);
  p[kGamma] = pick(1, 0.2, 5);
  p[kSigma] = pick(0, 0, 16);
  p[kSolarize] = pick(2, 0, 1);
  p[kGainNear] = pick(1, 0, 3);
  p[kGainFar] = pick(1, 0, 3);
  p[kSpeckle] = pick(0, 0, 1);
  p[kSeed] = static_cast<float>(whole(0, (1 << 24) - 1));
}

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

struct Views {
  Job job;
  std::unique_ptr<uint8_t[]> frames;
  std::unique_ptr<int64_t[]> index, order;
  std::unique_ptr<float[]> params;
  std::unique_ptr<char[], Free> out;  // aligned as PyTorch's, for non-temporal stores
  int64_t num_views, num_bytes;
};

Views make(int64_t run) {
  const int64_t store = chance(0.1) ? whole(300, 1100) : whole(1, 130), num_frames = whole(1, 3);
  const int64_t height = whole(1, chance(0.2) ? 300 : 60);
  int64_t width = whole(1, chance(0.2) ? 300 : 60);
  if (chance(0.3)) width = round_up(width, chance(0.5) ? 16 : 32);  // for non-temporal stores
  Views v;
  v.num_views = whole(1, 5);
  v.frames.reset(new uint8_t[num_frames * store * store]);
  v.index.reset(new int64_t[v.num_views]);
  v.order.reset(new int64_t[v.num_views]);
  v.params.reset(new float[v.num_views * kColumns]);
  const int kind = static_cast<int>(whole(0, 2));  // noise, white with black, flat
  for (int64_t i = 0; i < num_frames * store * store; ++i) {
    const auto word = generator();
    v.frames[i] = static_cast<uint8_t>(kind == 0 ? word : kind == 1 ? (word & 64 ? 255 : 0) : run);
  }
  for (int64_t i = 0; i < v.num_views; ++i) {
    v.index[i] = whole(0, num_frames - 1);
    v.order[i] = v.num_views - 1 - i;
    fill(&v.params[i * kColumns], static_cast<double>(store));
  }
  const bool half = chance(0.2);
  v.num_bytes = v.num_views * height * width * (half ? 2 : 4);
  v.out.reset(new (std::align_val_t{64}) char[v.num_bytes]);
  v.job = Job{v.frames.get(), v.index.get(), v.order.get(), v.params.get(), v.out.get(), store,
              height, width, 1.0f / kStep, 0, half, widest(), chance(0.5)};
  return v;
}

void make_all(Views& v, int64_t threads) {
  sslus::Pool::run(
      (v.num_views + 1) / 2, threads,
      [](void* context, int64_t i) {
        thread_local Scratch scratch;
        const auto& views = *static_cast<const Views*>(context);
        make_views(views.job, 2 * i, std::min(2 * i + 2, views.num_views), scratch);
      },
      &v);
}

// An exception reaches the caller once no thread is at work any more, and the pool goes on.
bool pool_passes_exceptions_on(int64_t threads) {
  struct Items {
    int64_t bad;
    std::atomic<int64_t> num_done{0}, at_work{0};
  };
  for (int64_t bad : {0, 57, 99, -1}) {
    Items items{bad};
    bool thrown = false;
    try {
      sslus::Pool::run(
          100, threads,
          [](void* context, int64_t i) {
            auto& x = *static_cast<Items*>(context);
            ++x.at_work;
            if (i != x.bad) ++x.num_done;
            --x.at_work;
            if (i == x.bad) throw std::runtime_error("bad");
          },
          &items);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    if (thrown != (bad >= 0) || items.at_work != 0) return false;
    if (!thrown && items.num_done != 100) return false;
  }
  return true;
}

// Of two callers at the same time, each has all of its work done when its call returns.
bool callers_take_turns() {
  std::atomic<bool> right{true};
  const auto call = [&right] {
    for (int i = 0; i < 300; ++i) {
      std::atomic<int64_t> num_done{0};
      sslus::Pool::run(
          9, 2, [](void* done, int64_t) { ++*static_cast<std::atomic<int64_t>*>(done); },
          &num_done);
      if (num_done != 9) right = false;
    }
  };
  std::thread other(call);
  call();
  other.join();
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fputs("usage: fuzz FILE [RUNS]\n", stderr), 2;
  const int64_t runs = argc > 2 ? std::atoll(argv[2]) : 300;
  for (int64_t threads = 1; threads <= 3; ++threads)
    if (!pool_passes_exceptions_on(threads)) return std::fputs("an exception is lost\n", stderr), 1;
  if (!callers_take_turns()) return std::fputs("a caller's work is not done\n", stderr), 1;
  std::ifstream known(argv[1], std::ios::binary);
  std::ofstream written;
  if (!known) written.open(argv[1], std::ios::binary);
  int64_t num_pixels = 0, num_off = 0;
  for (int64_t run = 0; run < runs; ++run) {
    Views v = make(run);
    make_all(v, 1 + run % 3);
    const std::string widest_views(v.out.get(), static_cast<size_t>(v.num_bytes));
    while (v.job.vectors != Vectors::kCompilers) {  // all must agree, bit for bit
      v.job.vectors = v.job.vectors == Vectors::kAvx512 ? Vectors::kAvx2 : Vectors::kCompilers;
      make_all(v, 1);
      if (std::memcmp(widest_views.data(), v.out.get(), widest_views.size()) != 0)
        return std::fprintf(stderr, "run %lld: other views with Vectors %d\n",
                            static_cast<long long>(run), static_cast<int>(v.job.vectors)), 1;
    }
    if (v.job.half) continue;  // only for sanitizers: rounding would hide or create differences
    const auto* pixels = reinterpret_cast<const float*>(v.out.get());
    std::unique_ptr<float[]> before(new float[v.num_bytes / 4]);
    if (written.is_open()) {
      written.write(v.out.get(), v.num_bytes);
      std::copy_n(pixels, v.num_bytes / 4, before.get());
    } else {
      known.read(reinterpret_cast<char*>(before.get()), v.num_bytes);
    }
    for (int64_t i = 0; i < v.num_bytes / 4; ++i, ++num_pixels) {
      if (!(pixels[i] >= 0 && pixels[i] <= 256))
        return std::fprintf(stderr, "run %lld: a pixel of %g\n", static_cast<long long>(run),
                            static_cast<double>(pixels[i])), 1;
      num_off += std::fabs(pixels[i] - before[i]) > 0.25f;
    }
  }
  // At its threshold, solarize turns a difference in the last bit into black or white.
  std::printf("%lld pixels, %lld of them off by more than 0.25 grey levels\n",
              static_cast<long long>(num_pixels), static_cast<long long>(num_off));
  return num_off * 1000 > num_pixels;
}
