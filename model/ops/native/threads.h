// A pool of threads that share numbered tasks: a free thread takes the next task.
//
// A region is one call of run_tasks: its tasks, and the threads that work on them. The calling
// thread works too. After a region the other threads spin for some microseconds, so that the many
// small regions of a step start without delay; then they sleep. Results do not depend on the thread
// that runs a task: every task writes to its own places, and all threads have the same
// floating-point mode.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace milliways {

// Runs task(0) .. task(num_tasks - 1) in any order; returns when all have ended. Several threads
// may call it at the same time: the pool works for one of them, the others run their tasks alone.
// An exception of a task is thrown to the caller, after all tasks have ended.
void run_tasks(int num_tasks, const std::function<void(int)>& task);

// Small operations on rows: several rows to a task, of about 16,000 operations.
template <typename Body>
void each_row(int64_t num_rows, int64_t row_cost, const Body& body) {
  const int64_t step = std::max<int64_t>(1, 16 * 1024 / std::max<int64_t>(1, row_cost));
  run_tasks(static_cast<int>((num_rows + step - 1) / step), [&](int task) {
    const int64_t end = std::min(num_rows, (task + 1) * step);
    for (int64_t i = task * step; i < end; i++) body(i);
  });
}

// The number of threads of a region, with the caller: 1 to 256. The default is one for each
// processor that this process may use.
void set_num_threads(int num_threads);
int num_threads();

// The processors that this process may use: its affinity, and the quota of its control group.
int num_usable_processors();
// A short pause, for loops that wait.
void pause_thread();

}  // namespace milliways
