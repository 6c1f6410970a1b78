// What device.h declares, and the two functions that a process finds in the library.

#include "device.h"

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "context.h"

namespace host {
thread_local Index3 thread_index, block_index;

namespace {
constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 128 << 10;

struct Entry {
    unsigned threads, params_size;
    Kernel kernel;
};

// A module registers its kernels while it is loaded, beside others at work.
std::mutex& guard() {
    static std::mutex mutex;
    return mutex;
}
std::map<std::string, Entry>& entries() {
    static std::map<std::string, Entry> all;
    return all;
}

struct Fiber {
    Context context;
    std::vector<char> stack;
    bool ended;
    Wait wait;
};

// What one thread of the host needs to run blocks one after the other.
struct Block {
    Context scheduler;
    std::vector<Fiber> fibers;
    std::vector<unsigned> words;
    Entry entry;
    const void* params;
    unsigned current;

    [[noreturn]] void complain(const char* what) {
        fprintf(stderr, "block %u, thread %u: %s\n", block_index.x, current, what);
        abort();
    }

    // Runs the threads of a warp to what they wait for next, all of them to the same.
    Wait run_warp(unsigned first, unsigned end, bool reversed) {
        Wait wait = NOT;
        unsigned num_ended = 0;
        for (unsigned i = 0; i < end - first; i++) {
            current = reversed ? end - 1 - i : first + i;
            Fiber& fiber = fibers[current];
            if (fiber.ended) {
                num_ended++;
                continue;
            }
            thread_index = {current, 0, 0};
            fiber.wait = NOT;
            switch_to(scheduler, fiber.context);
            num_ended += fiber.ended;
            if (fiber.ended) continue;
            if (wait != NOT && wait != fiber.wait) complain("waits for something else than its warp");
            wait = fiber.wait;
        }
        if (wait == WARP_WAIT && num_ended > 0) complain("exchanges with a lane that has ended");
        return wait;
    }

    void run(unsigned index, bool reversed);
};

thread_local Block* running;

void enter() {
    Block& block = *running;
    block.entry.kernel(block.params);
    Fiber& fiber = block.fibers[block.current];
    fiber.ended = true;
    switch_to(fiber.context, block.scheduler);
}

void Block::run(unsigned index, bool reversed) {
    running = this;
    block_index = {index, 0, 0};
    for (Fiber& fiber : fibers) {
        fiber.ended = false;
        begin_at(fiber.context, fiber.stack.data(), fiber.stack.size(), enter);
    }
    unsigned threads = entry.threads, warps = (threads + WARP - 1) / WARP;
    for (;;) {
        unsigned at_barrier = 0, ended = 0;
        for (unsigned w = 0; w < warps; w++) {
            unsigned warp = reversed ? warps - 1 - w : w;
            unsigned first = warp * WARP, end = first + WARP < threads ? first + WARP : threads;
            while (run_warp(first, end, reversed) == WARP_WAIT) {}
            for (unsigned i = first; i < end; i++) {
                at_barrier += !fibers[i].ended;
                ended += fibers[i].ended;
            }
        }
        if (at_barrier == 0) return;
        if (ended > 0) complain("waits at a barrier that others have not come to, because they have ended");
    }
}
}  // namespace

void wait_for(Wait wait) {
    Block& block = *running;
    Fiber& fiber = block.fibers[block.current];
    fiber.wait = wait;
    switch_to(fiber.context, block.scheduler);
}

unsigned* exchange() { return running->words.data() + running->current / WARP * WARP * EXCHANGED; }

Registered::Registered(const char* module, const char* name, unsigned threads, unsigned params_size, Kernel kernel) {
    std::lock_guard<std::mutex> lock(guard());
    entries()[std::string(module) + "/" + name] = {threads, params_size, kernel};
}
}  // namespace host

// Threads of a block, and bytes of parameters, of a kernel "module/name"; false if there is none.
extern "C" bool fullbore_find(const char* name, unsigned* threads, unsigned* params_size) {
    std::lock_guard<std::mutex> lock(host::guard());
    auto found = host::entries().find(name);
    if (found == host::entries().end()) return false;
    *threads = found->second.threads;
    *params_size = found->second.params_size;
    return true;
}

// Runs `blocks` blocks of the kernel, on all threads of the host, and returns when they have ended.
extern "C" void fullbore_launch(const char* name, unsigned blocks, const void* params, bool reversed) {
    using namespace host;
    guard().lock();
    const Entry entry = entries().at(name);
    guard().unlock();
    std::atomic<unsigned> next{0};
    auto work = [&] {
        Block block;
        block.entry = entry;
        block.params = params;
        block.fibers.resize(entry.threads);
        block.words.resize((entry.threads + WARP) * EXCHANGED);
        for (Fiber& fiber : block.fibers) fiber.stack.resize(STACK_BYTES);
        for (unsigned index = next++; index < blocks; index = next++)
            block.run(reversed ? blocks - 1 - index : index, reversed);
    };
    unsigned threads = std::thread::hardware_concurrency();
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads && i < blocks; i++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
}
