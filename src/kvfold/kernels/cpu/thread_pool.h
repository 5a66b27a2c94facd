// A few threads that wait for work: a short spin, then sleep. The caller works too.
#pragma once
#include <functional>

namespace kvfold {

// Who works beside the caller. OWN threads serve the compiled step, in which torch does nothing. Between torch's own operations,
// as in a prompt, its threads are the better ones: those of OpenMP go on asking for work for milliseconds after each operation,
// and would keep others from the cores.
enum class Team { OWN, TORCH };

// Calls work(task) for every task in [0, num_tasks), on up to `num_threads` threads. Where torch's threads can't be had, OWN ones
// work. One call at a time uses those: a second one from another thread meanwhile runs on its caller alone.
void parallel_for(int num_tasks, int num_threads, const std::function<void(int task)>& work, Team team = Team::OWN);

}  // namespace kvfold
