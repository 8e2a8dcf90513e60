// A pool of threads that share numbered tasks: whoever is free takes the next one.
//
// The calling thread works too. Between two regions the others spin for some microseconds, so that
// the many small regions of a step start at once, and then sleep. Results must not depend on who
// runs a task: every task writes places of its own, and all compute in one floating-point mode.
#pragma once

#include <functional>

namespace milliways {

// Runs task(0) .. task(num_tasks - 1), in any order, and returns when all are done. Calls from
// several threads at once are allowed: the pool serves one of them, the others run alone. What a
// task throws is thrown to the caller, after all tasks have ended.
void run_tasks(int num_tasks, const std::function<void(int)>& task);

// How many threads work in a region, the caller included, from 1 to 256; at first as many as this
// process may use processors.
void set_num_threads(int num_threads);
int num_threads();

}  // namespace milliways
