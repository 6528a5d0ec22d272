// Threads that spin briefly, then yield, then park. See team.h.
#include "team.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>

namespace lowbit {
namespace {

// Waking a parked thread takes about 50 us, so a waiting one spins about twice as long before it parks.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr auto kYield = std::chrono::microseconds(100);

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// CPUs that a cgroup's quota allows, rounded down; 0 where there is no limit. Walks from the process's own
// group up to the root, since a parent may be tighter.
size_t cgroup_cpus() {
  size_t best = 0;
  const auto limit = [&best](double quota, double period) {
    if (quota <= 0 || period <= 0) return;
    const size_t cpus = std::max<size_t>(1, static_cast<size_t>(quota / period));
    best = best == 0 ? cpus : std::min(best, cpus);
  };
  std::ifstream self("/proc/self/cgroup");
  std::string line;
  while (std::getline(self, line)) {
    const size_t second = line.find(':', line.find(':') + 1);
    if (second == std::string::npos) continue;
    const bool v2 = line.compare(0, 3, "0::") == 0;
    if (!v2 && line.find("cpu") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    while (true) {
      const std::string root = (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + path;
      if (v2) {
        std::ifstream file(root + "/cpu.max");
        std::string quota;
        double period = 0;
        if (file >> quota >> period && quota != "max") limit(std::atof(quota.c_str()), period);
      } else {
        double quota = 0, period = 0;
        std::ifstream(root + "/cpu.cfs_quota_us") >> quota;
        std::ifstream(root + "/cpu.cfs_period_us") >> period;
        limit(quota, period);
      }
      const size_t slash = path.rfind('/');
      if (path.empty() || slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  return best;
}

}  // namespace

size_t default_threads() {
  if (const char* text = std::getenv("LOWBIT_THREADS")) {
    const long n = std::atol(text);
    if (n > 0) return static_cast<size_t>(std::min(n, 1024L));
  }
  size_t cpus = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = static_cast<size_t>(std::max(1, CPU_COUNT(&set)));
#endif
  const size_t quota = cgroup_cpus();
  return quota ? std::min(cpus, quota) : cpus;
}

Team::Team(size_t threads) {
  for (size_t id = 1; id < threads; ++id) workers_.emplace_back([this, id] { worker(id); });
}

Team::~Team() {
  stop_.store(true);
  generation_.fetch_add(1);
  wake_sleepers();
  for (std::thread& t : workers_) t.join();
}

template <typename Condition>
void Team::wait_until(Condition condition) {
  const auto start = std::chrono::steady_clock::now();
  while (true) {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return;
      pause_cpu();
    }
    const auto waited = std::chrono::steady_clock::now() - start;
    if (waited > kSpin + kYield) break;
    if (waited > kSpin) std::this_thread::yield();
  }
  // The waker stores its state, then reads sleepers_; we raise sleepers_, then read the state. Both in
  // sequential order, so one of the two sees the other.
  std::unique_lock<std::mutex> lock(sleep_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, condition);
  sleepers_.fetch_sub(1);
}

void Team::wake_sleepers() {
  if (sleepers_.load() == 0) return;
  std::lock_guard<std::mutex> lock(sleep_);
  wake_.notify_all();
}

void Team::arrive() {
  const uint32_t phase = phase_.load();
  if (arrived_.fetch_add(1) + 1 == size()) {
    arrived_.store(0);
    phase_.store(phase + 1);
    wake_sleepers();
    return;
  }
  wait_until([this, phase] { return phase_.load() != phase; });
}

void Member::barrier() const {
  if (count > 1) team->arrive();
}

void Team::worker(size_t id) {
  uint64_t seen = 0;
  while (true) {
    wait_until([this, seen] { return generation_.load() != seen; });
    if (stop_.load()) return;
    ++seen;  // runs are serialised, so a member is at most one behind
    (*work_)(Member{this, id, size()});
    arrive();
  }
}

void Team::run(const std::function<void(const Member&)>& work) {
  std::lock_guard<std::mutex> lock(entry_);
  if (workers_.empty()) {
    work(Member{this, 0, 1});
    return;
  }
  work_ = &work;
  generation_.fetch_add(1);
  wake_sleepers();
  work(Member{this, 0, size()});
  arrive();
}

namespace {

struct Current {
  std::mutex mutex;
  std::shared_ptr<Team> team;
  size_t wanted = 0;
  pid_t owner = 0;
};

Current& current() {
  static Current* const instance = new Current;  // never destroyed: threads may outlive static objects
  return *instance;
}

}  // namespace

std::shared_ptr<Team> team() {
  Current& c = current();
  const std::lock_guard<std::mutex> lock(c.mutex);
  const pid_t pid = getpid();
  if (c.team && c.owner != pid) {  // threads do not survive fork(), so the child leaves the old object alone
    new std::shared_ptr<Team>(std::move(c.team));
    c.team.reset();
  }
  if (!c.team) {
    c.team = std::make_shared<Team>(c.wanted ? c.wanted : default_threads());
    c.owner = pid;
  }
  return c.team;
}

void set_team_size(size_t threads) {
  Current& c = current();
  std::shared_ptr<Team> old;  // joined after the lock is released
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.wanted = threads;
  if (c.owner == getpid() && c.team && c.team->size() != (threads ? threads : default_threads()))
    old.swap(c.team);
}

}  // namespace lowbit
