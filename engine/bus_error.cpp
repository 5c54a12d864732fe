// sslus.engine._bus_error: a line for the user where a memory-mapped file can no longer be read.
//
// The system ends a process that reads a mapped page of which the file was cut off, or the disk or
// the file server failed: SIGBUS, which Python cannot handle. Only functions that are safe in a
// signal handler are called.
#include <fcntl.h>
#include <nanobind/nanobind.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace {

constexpr size_t kLine = 4352;  // of /proc/self/maps: numbers, and a path of up to 4096 bytes

struct sigaction previous;
std::atomic<bool> told{false};

void say(const char* text, size_t length) {
  if (write(STDERR_FILENO, text, length) < 0) return;  // nobody is left to hear it
}

// The number in hexadecimal digits at `text`, which is moved past them.
uintptr_t number(const char*& text) {
  uintptr_t value = 0;
  for (;; ++text) {
    if (*text >= '0' && *text <= '9')
      value = value * 16 + static_cast<uintptr_t>(*text - '0');
    else if (*text >= 'a' && *text <= 'f')
      value = value * 16 + static_cast<uintptr_t>(*text - 'a' + 10);
    else
      return value;
  }
}

// A line `start-end ... /path` of /proc/self/maps: its path if `address` is in it, else null.
const char* path_of(const char* line, uintptr_t address) {
  const uintptr_t start = number(line);
  if (*line++ != '-' || address < start || address >= number(line)) return nullptr;
  return std::strchr(line, '/');
}

void say_file(uintptr_t address) {
  char line[kLine];
  size_t length = 0;
  const int maps = open("/proc/self/maps", O_RDONLY);  // Linux only
  for (char c; maps >= 0 && read(maps, &c, 1) == 1;) {
    if (c != '\n') {
      if (length < kLine - 1) line[length++] = c;
      continue;
    }
    line[length] = 0;
    length = 0;
    if (const char* path = path_of(line, address)) {
      say(path, std::strlen(path));
      close(maps);
      return;
    }
  }
  if (maps >= 0) close(maps);
  const char text[] = "a memory-mapped file";
  say(text, sizeof text - 1);
}

void explain(int, siginfo_t* info, void*) {
  if (!told.exchange(true)) {
    const char before[] = "Error: ";
    const char after[] =
        ": a part of it cannot be read any more; it was cut off while in use, or its disk or file"
        " server failed. Check these, then run the same command again (train: with --resume)\n";
    say(before, sizeof before - 1);
    say_file(reinterpret_cast<uintptr_t>(info->si_addr));
    say(after, sizeof after - 1);
  }
  sigaction(SIGBUS, &previous, nullptr);  // what reads again fails again, and ends as before
}

void install() {
  static const bool once = [] {
    struct sigaction action = {};
    action.sa_sigaction = explain;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGBUS, &action, &previous) == 0;
  }();
  (void)once;
}

}  // namespace

NB_MODULE(_bus_error, m) {
  m.doc() = "A line for the user where a memory-mapped file can no longer be read.";
  m.def("install", &install,
        "From now on, a failed read of a mapped file (SIGBUS) names the file before it ends the"
        " process as before.");
}
