// A thread pool, kept between calls: starting a thread takes as long as making a view.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

namespace sslus {

class Pool {
 public:
  using Work = void (*)(void* context, int64_t item);

  // Calls work(context, i) for every i < count on `threads` threads, including the caller's. With
  // one thread the pool is not used, so such callers run concurrently; calls with more threads
  // take turns. The first exception is rethrown, after all threads have stopped.
  static void run(int64_t count, int64_t threads, Work work, void* context) {
    if (threads <= 1 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) work(context, i);
      return;
    }
    instance().share(count, std::min(threads, count), work, context);
  }

 private:
  // Never destroyed: workers may still be waiting when the process ends. A forked child has none
  // of its parent's threads, and the locks are in an unknown state, so it starts its own pool.
  static Pool& instance() {
    static std::atomic<Pool*> pool{new Pool};
#if __has_include(<pthread.h>)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    (void)registered;
#endif
    return *pool;
  }

  void share(int64_t count, int64_t threads, Work work, void* context) {
    const std::lock_guard<std::mutex> turn(callers_);
    while (static_cast<int64_t>(workers_.size()) < threads - 1)
      workers_.emplace_back([this] { serve(); });
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work, context_ = context, count_ = count, next_ = 0, error_ = nullptr;
      open_ = threads - 1;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = 0;  // workers that have not joined yet no longer need to
    done_.wait(lock, [this] { return busy_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_ > 0; });
      --open_, ++busy_;
      lock.unlock();
      take();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void take() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
        work_(context_, i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Work work_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0, open_ = 0, busy_ = 0;  // open_: how many workers may still join
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
};

}  // namespace sslus
