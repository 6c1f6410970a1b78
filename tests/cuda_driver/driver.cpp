// A CUDA driver without a GPU, of the kind that FULLBORE_DRIVER names, for tests of what calls one. Memory is the host's;
// of kernels it runs `mul_add` alone, when it is launched, or when a graph is that has it. What a driver would not
// survive ends the process: addresses, streams, events and kernels that are not of the current context, nodes of another
// graph. It tells of each context that begins and ends, of each piece of memory and each module that is taken, of each
// graph that is made, and that is launched with how many of its nodes set anew.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {
enum {
    SUCCESS = 0,
    OUT_OF_MEMORY = 2,
    DEVICE_UNAVAILABLE = 46,
    NO_DEVICE = 100,
    UNSUPPORTED_PTX = 222,
    NOT_FOUND = 500,
    UNKNOWN = 999,
    NOT_READY = 600,
    CONTEXT_IS_DESTROYED = 709,
    LAUNCH_FAILED = 719,
};

typedef uintptr_t Address;

// What was made in it is of no use in another, nor after its end. Its streams and events are its own address.
struct Context {
    std::map<Address, size_t> memory;
    bool has_ended;
};

struct Module {
    Context* context;
    std::string ptx;
};

struct Function {
    Context* context;
    std::string name;
    size_t params_size;
};

struct Launch {
    const Function* function;
    unsigned blocks, threads;
    std::vector<char> params;
};

// Launches one after the other, each behind the one before it.
struct Graph {
    std::vector<Launch*> nodes;
};

struct Executable {
    const Graph* graph;
    std::vector<Launch> launches;
    unsigned num_set;
};

thread_local Context* current = nullptr;
bool was_lost = false;
unsigned num_queries = 0;
// By themselves, since a graph was launched.
unsigned num_launched = 0;

bool is(const char* kind) {
    const char* given = getenv("FULLBORE_DRIVER");
    return given && !strcmp(given, kind);
}

void expect(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "the driver would not survive this: %s\n", what);
    abort();
}

void check_context(const void* of) { expect(current && !current->has_ended && (!of || of == current), "a call without its context"); }

void check(Address at, size_t size) {
    check_context(nullptr);
    auto& memory = current->memory;
    auto next = memory.upper_bound(at);
    bool inside = next != memory.begin() && at + size <= (--next)->first + next->second;
    expect(inside, "an address that is not of its memory");
}

int allocate(const char* where, Address* at, size_t size) {
    check_context(nullptr);
    fprintf(stderr, "takes %zu bytes of the %s\n", size, where);
    if (is("small") && size > 1 << 20) return OUT_OF_MEMORY;
    *at = (Address)malloc(size);
    current->memory[*at] = size;
    return SUCCESS;
}

void run(const Launch& launch) {
    check_context(launch.function->context);
    if (launch.function->name != "mul_add") return;
    struct {
        float* x;
        unsigned num_elements;
        float scale, offset;
        unsigned rounds;
    } p;
    expect(launch.params.size() == sizeof p, "parameters of another size");
    memcpy(&p, launch.params.data(), sizeof p);
    check((Address)p.x, p.num_elements * 4);
    expect(launch.threads == 256 && launch.blocks >= 1, "another number of threads");
    for (unsigned i = 0; i < p.num_elements; i++)
        for (unsigned round = 0; round < p.rounds; round++) p.x[i] = p.x[i] * p.scale + p.offset;
}

Launch launch_of(const Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, void** params) {
    expect(x > 0 && y == 1 && z == 1 && threads > 0 && threads <= 1024, "a launch of another form");
    const char* bytes = (const char*)params[0];
    return {function, x, threads, std::vector<char>(bytes, bytes + function->params_size)};
}
}  // namespace

#define CALL extern "C" int

CALL cuDriverGetVersion(int* version) { return *version = is("old") ? 11040 : 12020, SUCCESS; }
CALL cuInit(unsigned) { return is("none") ? NO_DEVICE : SUCCESS; }
CALL cuGetErrorName(int error, const char** name) {
    *name = error == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : error == UNSUPPORTED_PTX ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" : "CUDA_ERROR";
    return SUCCESS;
}
CALL cuGetErrorString(int error, const char** text) {
    *text = error == DEVICE_UNAVAILABLE ? "it is busy" : error == LAUNCH_FAILED ? "it is lost" : "it has failed";
    return SUCCESS;
}
CALL cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
CALL cuDeviceGetCount(int* count) { return *count = is("first-unwell") || is("all-unwell") ? 2 : 1, SUCCESS; }
CALL cuDeviceGetName(char* name, int size, int device) {
    if (is("all-unwell") || (is("first-unwell") && device == 0)) return UNKNOWN;
    return snprintf(name, size, is("part") ? "a double MIG 1g.10gb" : "a double"), SUCCESS;
}
CALL cuDeviceGetUuid_v2(unsigned char* uuid, int) { return memset(uuid, 0xab, 16), SUCCESS; }
CALL cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = 3 << 20, SUCCESS; }
CALL cuDeviceGetAttribute(int* value, int which, int) {
    bool is_turing = is("turing");
    return *value = which == 75 ? (is_turing ? 7 : 8) : which == 76 ? (is_turing ? 5 : 6) : 4, SUCCESS;
}
CALL cuCtxCreate_v2(Context** context, unsigned, int) {
    if (is("busy")) return DEVICE_UNAVAILABLE;
    fprintf(stderr, "a context begins\n");
    return *context = current = new Context{}, SUCCESS;
}
CALL cuCtxDestroy_v2(Context* context) {
    expect(context && !context->has_ended, "a context that ends twice");
    fprintf(stderr, "a context ends\n");
    for (auto& [at, size] : context->memory) free((void*)at);
    context->memory.clear();
    was_lost = context->has_ended = true;
    if (current == context) current = nullptr;
    return SUCCESS;
}
CALL cuCtxSetCurrent(Context* context) {
    if (context && context->has_ended) return CONTEXT_IS_DESTROYED;
    return current = context, SUCCESS;
}
CALL cuMemGetInfo_v2(size_t* free, size_t* total) {
    check_context(nullptr);
    return *free = *total = 1 << 30, SUCCESS;
}

CALL cuMemAlloc_v2(Address* at, size_t size) { return allocate("device", at, size); }
CALL cuMemHostAlloc(void** at, size_t size, unsigned) { return allocate("host", (Address*)at, size); }
CALL cuMemFreeHost(void* at) {
    check_context(nullptr);
    expect(current->memory.erase((Address)at) == 1, "memory that is freed twice");
    return free(at), SUCCESS;
}
CALL cuMemsetD8Async(Address at, unsigned char value, size_t size, void* stream) {
    check_context(stream);
    check(at, size);
    memset((void*)at, value, size);
    return SUCCESS;
}
CALL cuMemcpyAsync(Address to, Address from, size_t size, void* stream) {
    check_context(stream);
    check(to, size);
    check(from, size);
    memcpy((void*)to, (void*)from, size);
    return SUCCESS;
}
CALL cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t size, void* stream) {
    check_context(stream);
    check(to, size);
    memcpy((void*)to, from, size);
    return SUCCESS;
}
// What comes back beside a running device is pinned.
CALL cuMemcpyDtoHAsync_v2(void* to, Address from, size_t size, void* stream) {
    return cuMemcpyAsync((Address)to, from, size, stream);
}

CALL cuModuleLoadDataEx(Module** module, const char* image, unsigned num_options, const int* options, void** values) {
    check_context(nullptr);
    expect(num_options == 2 && options[0] == 5 && options[1] == 6 && (size_t)values[1] > 64, "no room for a log");
    if (is("strange")) {
        snprintf((char*)values[0], (size_t)values[1], "ptxas fatal: no such version");
        return UNSUPPORTED_PTX;
    }
    fprintf(stderr, "takes a module\n");
    *module = new Module{current, image};
    return SUCCESS;
}
CALL cuModuleGetFunction(Function** function, Module* module, const char* name) {
    check_context(module->context);
    size_t at = module->ptx.find(".entry " + std::string(name) + "(");
    if (at == std::string::npos) return NOT_FOUND;
    // `.param .align 8 .b8 NAME_param_0[SIZE]`
    at = module->ptx.find('[', at);
    *function = new Function{current, name, strtoul(module->ptx.c_str() + at + 1, nullptr, 10)};
    return SUCCESS;
}
CALL cuLaunchKernel(const Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned,
                    void* stream, void** params, void**) {
    check_context(stream);
    run(launch_of(function, x, y, z, threads, params));
    num_launched++;
    return SUCCESS;
}

CALL cuStreamCreate(void** stream, unsigned) { return check_context(nullptr), *stream = current, SUCCESS; }
CALL cuStreamSynchronize(void* stream) { return check_context(stream), SUCCESS; }

struct NodeParams {
    const Function* function;
    unsigned x, y, z, threads, threads_y, threads_z, shared;
    void **params, **extra, *kernel, *context;
};

CALL cuGraphCreate(Graph** graph, unsigned) { return *graph = new Graph, SUCCESS; }
CALL cuGraphAddKernelNode_v2(Launch** node, Graph* graph, Launch* const* before, size_t num_before, const NodeParams* p) {
    auto& nodes = graph->nodes;
    expect(num_before == !nodes.empty() && (nodes.empty() || *before == nodes.back()), "a node in another order");
    nodes.push_back(*node = new Launch(launch_of(p->function, p->x, p->y, p->z, p->threads, p->params)));
    return SUCCESS;
}
CALL cuGraphInstantiateWithFlags(Executable** made, const Graph* graph, unsigned long long) {
    if (is("full")) return OUT_OF_MEMORY;
    *made = new Executable{graph, {}, 0};
    for (const Launch* node : graph->nodes) (*made)->launches.push_back(*node);
    fprintf(stderr, "made a graph of %zu nodes\n", graph->nodes.size());
    return SUCCESS;
}
CALL cuGraphExecKernelNodeSetParams_v2(Executable* executable, const Launch* node, const NodeParams* p) {
    auto& nodes = executable->graph->nodes;
    size_t at = std::find(nodes.begin(), nodes.end(), node) - nodes.begin();
    expect(at < nodes.size() && nodes[at]->function == p->function, "a node of another graph, or of another kernel");
    executable->launches[at] = launch_of(p->function, p->x, p->y, p->z, p->threads, p->params);
    executable->num_set++;
    return SUCCESS;
}
CALL cuGraphDestroy(Graph* graph) {
    for (Launch* node : graph->nodes) delete node;
    return delete graph, SUCCESS;
}
CALL cuGraphExecDestroy(Executable* executable) { return delete executable, SUCCESS; }
#ifndef WITHOUT_GRAPHS
CALL cuGraphLaunch(Executable* executable, void* stream) {
    check_context(stream);
    fprintf(stderr, "a graph of %zu launches, %u set, after %u\n", executable->launches.size(), executable->num_set, num_launched);
    executable->num_set = num_launched = 0;
    for (const Launch& launch : executable->launches) run(launch);
    return SUCCESS;
}
#endif

CALL cuEventCreate(void** event, unsigned) { return check_context(nullptr), *event = current, SUCCESS; }
CALL cuEventRecord(void* event, void* stream) { return check_context(event), check_context(stream), SUCCESS; }
// Not ready when it is first asked.
CALL cuEventQuery(void* event) {
    check_context(event);
    if (is("lost") && !was_lost) return LAUNCH_FAILED;
    return num_queries++ % 2 == 0 ? NOT_READY : SUCCESS;
}
CALL cuEventElapsedTime(float* ms, void*, void*) { return *ms = 0.25f, SUCCESS; }
