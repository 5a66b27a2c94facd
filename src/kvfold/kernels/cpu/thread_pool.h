// A few threads that wait for work: a short spin, then sleep. The caller works too.
#pragma once
#include <functional>

namespace kvfold {

// Calls work(task, thread) for every task in [0, num_tasks), on up to `num_threads` threads; `thread` counts from 0, the
// caller. One call at a time uses the threads: a second one from another thread meanwhile runs on its caller alone.
void parallel_for(int num_tasks, int num_threads, const std::function<void(int task, int thread)>& work);

}  // namespace kvfold
