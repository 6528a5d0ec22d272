// A team of threads that runs one function together, with barriers inside.
//
// The decoder enters the team once per step and every member walks the same code, so a phase ends
// with a barrier, not with a dispatch. A waiting thread spins for about 50 us, then yields, then parks:
// a barrier that spins on an oversubscribed machine would stop the thread it waits for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lowbit {

class Team;
struct SideMemory;  // side_terms.cc

// What a thread knows while it works: who it is and how to meet the others.
struct Member {
  Team* team;
  size_t id;     // 0 .. count-1; 0 is the caller
  size_t count;  // threads in the team
  void barrier() const;
  // Contiguous share of `total` items: [begin, end).
  void share(size_t total, size_t* begin, size_t* end) const {
    *begin = total * id / count;
    *end = total * (id + 1) / count;
  }
};

class Team {
 public:
  explicit Team(size_t threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  size_t size() const { return workers_.size() + 1; }
  // Runs `work` on every member and returns when all have finished. Calls from several threads queue up.
  void run(const std::function<void(const Member&)>& work);
  // What members of a run share between barriers beside their arguments.
  std::shared_ptr<SideMemory> side_memory;

 private:
  friend struct Member;
  void worker(size_t id);
  void arrive();

  std::vector<std::thread> workers_;
  std::mutex entry_;  // one run at a time
  const std::function<void(const Member&)>* work_ = nullptr;
  std::atomic<uint64_t> generation_{0};  // bumped for each run
  std::atomic<uint32_t> arrived_{0};     // members at the current barrier
  std::atomic<uint32_t> phase_{0};       // bumped when a barrier opens
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_;
  std::condition_variable wake_;
  template <typename Condition>
  void wait_until(Condition condition);
  void wake_sleepers();
};

// Threads worth starting: the smaller of the CPUs this process may use (affinity) and its cgroup quota,
// rounded down, at least 1. LOWBIT_THREADS overrides.
size_t default_threads();
// The process-wide team, made on first use. Whoever holds the pointer may finish its work on this team even
// if set_team_size() puts another in its place meanwhile.
std::shared_ptr<Team> team();
// How many members the team has from now on; 0: default_threads().
void set_team_size(size_t threads);

}  // namespace lowbit
