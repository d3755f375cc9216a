// NVRTC: compiles the unchanged source with g++ to a shared object, after the emulator's CUDA C++ header.

#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <regex>
#include <utility>

#include "emulator.h"

extern char** environ;

namespace xt {

struct Program {
    std::string source, name, log, image;
    bool ptx = false;
};

namespace {

enum NvrtcResult {
    NVRTC_SUCCESS = 0,
    NVRTC_OUT_OF_MEMORY = 1,
    NVRTC_INVALID_INPUT = 3,
    NVRTC_INVALID_PROGRAM = 4,
    NVRTC_INVALID_OPTION = 5,
    NVRTC_COMPILATION = 6,
    NVRTC_INTERNAL_ERROR = 11,
};

// Options that are accepted and have no effect here.
const char* const IGNORED[] = {"--ptxas-options", "-Xptxas", "--std", "-std", "--use_fast_math", "-use_fast_math",
                               "--fmad", "-fmad", "--ftz", "-ftz", "--prec-div", "--prec-sqrt", "--device-debug", "-G",
                               "--generate-line-info", "-lineinfo", "--maxrregcount", "-default-device",
                               "--device-as-default-execution-space", "--extra-device-vectorization", "--restrict",
                               "--disable-warnings", "-w", "--device-int128", "--diag-suppress", "--minimal"};

bool is_option(const std::string& text, const std::string& option) {
    return text == option || text.starts_with(option + "=");
}

struct Options {
    unsigned architecture = 75;
    bool ptx = false;
    std::vector<std::string> definitions;
};

// Architectures that nvrtcGetSupportedArchs returns: XT_EMULATOR_NVRTC_ARCHS, such as 80,90.
std::vector<int> architectures() {
    const char* list = getenv("XT_EMULATOR_NVRTC_ARCHS");
    if (list == nullptr) list = "75,80,86,89,90,100,120";
    std::vector<int> known;
    for (; list != nullptr; list = strchr(list, ',')) known.push_back(atoi(*list == ',' ? ++list : list));
    return known;
}

// Parses the options; returns an unknown one, or an empty string.
std::string parse(const std::vector<std::string>& given, Options& options) {
    for (size_t i = 0; i < given.size(); ++i) {
        const std::string& option = given[i];
        const size_t equals = option.find('=');
        const std::string value = equals == std::string::npos ? "" : option.substr(equals + 1);
        if (is_option(option, "--gpu-architecture") || is_option(option, "-arch")) {
            const size_t digits = value.find('_');
            if (digits == std::string::npos) return option;
            options.architecture = atoi(value.c_str() + digits + 1);
            options.ptx = value.starts_with("compute_");
            if (value.ends_with("90a")) options.definitions.push_back("-D__CUDA_ARCH_FEAT_SM90_ALL=1");
            const std::vector<int> known = architectures();
            if (std::find(known.begin(), known.end(), options.architecture) == known.end()) return option;
        } else if (option == "-D" || option == "-U") {
            if (++i == given.size()) return option;
            options.definitions.push_back(option + given[i]);
        } else if (option.starts_with("-D") || option.starts_with("-U")) {
            options.definitions.push_back(option);
        } else if (option.starts_with("--define-macro=")) {
            options.definitions.push_back("-D" + value);
        } else if (std::none_of(std::begin(IGNORED), std::end(IGNORED),
                                [&](const char* ignored) { return is_option(option, ignored); })) {
            return option;
        }
    }
    return "";
}

// Runs a program and collects its standard output and error in `output`.
bool execute(const std::vector<std::string>& command, std::string& output) {
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    // Keeps the compiler from loading this library in place of another one.
    std::vector<char*> environment;
    for (char** entry = environ; *entry != nullptr; ++entry) {
        const bool locale = strncmp(*entry, "LC_ALL=", 7) == 0;
        if (strncmp(*entry, "LD_LIBRARY_PATH=", 16) != 0 && strncmp(*entry, "LD_PRELOAD=", 11) != 0 && !locale) {
            environment.push_back(*entry);
        }
    }
    char plain[] = "LC_ALL=C";
    environment.push_back(plain);
    environment.push_back(nullptr);
    int ends[2];
    if (pipe(ends) != 0) return false;
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 2);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    posix_spawn_file_actions_addclose(&actions, ends[1]);
    pid_t child;
    const int error = posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environment.data());
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    if (error != 0) {
        close(ends[0]);
        output = command[0] + ": " + strerror(error);
        return false;
    }
    char part[4096];
    for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;) output.append(part, got);
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Replaces the text of ptx.cuh by that of ptx.h.
bool replace_ptx(std::string& source) {
    static const std::string MARK = "#line 1 \"ptx.cuh\"\n";
    const size_t start = source.find(MARK);
    if (start == std::string::npos) return true;
    std::string replacement;
    if (!read_file(folder() + "/ptx.h", replacement)) return false;
    const size_t body = start + MARK.size(), end = source.find("\n#line ", body);
    source.replace(start, (end == std::string::npos ? source.size() : end + 1) - start,
                   "#line 1 \"ptx.h\"\n" + replacement);
    return true;
}

// Turns `extern __shared__ T name[];` into a pointer to dynamic shared memory.
std::string replace_dynamic_shared(const std::string& source) {
    static const std::string ALIGN = R"((?:(?:__align__|alignas)\s*\([^)]*\)\s*)?)";
    static const std::regex PATTERN(R"(extern\s+__shared__\s+)" + ALIGN + R"(([\w\s:<>]+?)\s+)" + ALIGN +
                                    R"((\w+)\s*\[\s*\]\s*;)");
    return std::regex_replace(source, PATTERN, "$1* const $2 = reinterpret_cast<$1*>(xt_dynamic_shared);");
}

// Returns a line XT_KERNEL for each kernel of a preprocessed source.
std::string kernels_of(const std::string& source) {
    static const std::string MARK = "__attribute__((xt_global, noinline, visibility(\"default\")))";
    static const std::string BOUNDS = "__attribute__((xt_launch_bounds((";
    static const std::regex NAME(R"((\w+)\s*$)");
    std::string lines;
    for (size_t at = source.find(MARK); at != std::string::npos; at = source.find(MARK, at)) {
        at += MARK.size();
        std::string head = source.substr(at, source.find('{', at) - at), bounds = "0";
        if (const size_t start = head.find(BOUNDS); start != std::string::npos) {
            // Ends at the parenthesis that closes the first of the last two opened by BOUNDS.
            size_t end = start + BOUNDS.size();
            for (int open = 1; open > 0 && end < head.size(); ++end) open += (head[end] == '(') - (head[end] == ')');
            bounds = head.substr(start + BOUNDS.size(), end - 1 - start - BOUNDS.size());
            head.replace(start, end + 3 - start, "");
        }
        const std::string before = head.substr(0, head.find('('));
        std::smatch found;
        if (std::regex_search(before, found, NAME)) {
            lines += "XT_KERNEL(" + found[1].str() + ", xt_first(" + bounds + "))\n";
        }
    }
    return lines;
}

NvrtcResult compile(Program& program, const std::vector<std::string>& given) {
    Options options;
    const std::string unknown = parse(given, options);
    if (!unknown.empty()) {
        program.log = "nvrtc: error: invalid value for --gpu-architecture, or unknown option: " + unknown + "\n";
        return NVRTC_INVALID_OPTION;
    }
    std::string source = program.source;
    if (!replace_ptx(source)) {
        program.log = "ptx.h is not in " + folder();
        return NVRTC_INTERNAL_ERROR;
    }
    source = "#include \"cuda_host.h\"\n#line 1 \"" + program.name + "\"\n" + replace_dynamic_shared(source);

    const char* const chosen = getenv("CXX");
    const std::string compiler = chosen == nullptr || *chosen == 0 ? "g++" : chosen;
    std::vector<std::string> preprocess = {compiler, "-std=c++20", "-E", "-x", "c++", "-w", "-I", folder(),
                                           "-D__CUDA_ARCH__=" + std::to_string(options.architecture * 10)};
    preprocess.insert(preprocess.end(), options.definitions.begin(), options.definitions.end());
    const std::vector<std::string> build = {
        compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-nostdlib", "-pipe", "-w", "-x", "c++",
        // Memory accesses call the checker in this library.
        "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0",
        "-fsanitize=alignment,bounds,integer-divide-by-zero",
        // Modules share nothing.
        "-fvisibility=hidden", "-fno-gnu-unique",
        // Functions are those of cuda_host.h, and arithmetic is not reordered or fused.
        "-fno-builtin", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
        "-fno-exceptions", "-fno-rtti", "-fno-plt", "-fcf-protection=none", "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables"};

    std::string key = XT_EMULATOR_VERSION;
    for (const auto* list : {&std::as_const(preprocess), &build}) {
        for (const std::string& word : *list) key += word + '\n';
    }
    const std::string objects = folder() + "/kernels/objects", path = objects + "/" + hash_of(key + source);
    std::string object;
    if (!read_file(path + ".so", object)) {
        mkdir(objects.c_str(), 0777);
        // Unique to this process and program, since others may compile the same source.
        const std::string mine = std::to_string(getpid()) + "." + std::to_string(uintptr_t(&program));
        const std::string part = path + "." + mine;
        const std::string text = part + ".cu", expanded = part + ".ii", library = part + ".so";
        std::string whole;
        bool ok = write_file(text, source);
        if (!ok) program.log = "cannot write " + text;
        preprocess.insert(preprocess.end(), {"-o", expanded, text});
        ok = ok && execute(preprocess, program.log) && read_file(expanded, whole);
        if (ok) {
            const std::string lines = kernels_of(whole);
            // XT_KERNEL is a macro, expanded in the source with these lines appended.
            ok = write_file(text, source + "\n" + lines);
            std::vector<std::string> command = build;
            command.insert(command.end(), preprocess.begin() + 6, preprocess.end() - 3);
            command.insert(command.end(), {"-o", library, text, "-lm"});
            ok = ok && execute(command, program.log) && read_file(library, object);
            if (ok) rename(library.c_str(), (path + ".so").c_str());
        }
        unlink(text.c_str());
        unlink(expanded.c_str());
        unlink(library.c_str());
        if (!ok) return NVRTC_COMPILATION;
    }
    program.ptx = options.ptx;
    program.image = pack(object, {options.architecture, options.ptx, version_of("XT_EMULATOR_NVRTC")});
    return NVRTC_SUCCESS;
}

int copy_out(const std::string& text, bool terminated, char* to) {
    memcpy(to, text.c_str(), text.size() + terminated);
    return NVRTC_SUCCESS;
}

}  // namespace
}  // namespace xt

using namespace xt;

XT_EXPORT int nvrtcVersion(int* major, int* minor) {
    const unsigned version = version_of("XT_EMULATOR_NVRTC");
    *major = version / 1000;
    *minor = version % 1000 / 10;
    return NVRTC_SUCCESS;
}

XT_EXPORT int nvrtcGetNumSupportedArchs(int* count) {
    *count = architectures().size();
    return NVRTC_SUCCESS;
}

XT_EXPORT int nvrtcGetSupportedArchs(int* known) {
    for (int architecture : architectures()) *known++ = architecture;
    return NVRTC_SUCCESS;
}

XT_EXPORT const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
        case NVRTC_OUT_OF_MEMORY: return "NVRTC_ERROR_OUT_OF_MEMORY";
        case NVRTC_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case NVRTC_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case NVRTC_INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
        case NVRTC_COMPILATION: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
}

XT_EXPORT int nvrtcCreateProgram(Program** program, const char* source, const char* name, int headers,
                                 const char* const*, const char* const*) {
    if (program == nullptr || source == nullptr || headers != 0) return NVRTC_INVALID_INPUT;
    *program = new Program{source, name == nullptr ? "default_program" : name, "", "", false};
    return NVRTC_SUCCESS;
}

XT_EXPORT int nvrtcDestroyProgram(Program** program) {
    if (program == nullptr || *program == nullptr) return NVRTC_INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

XT_EXPORT int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (program == nullptr) return NVRTC_INVALID_PROGRAM;
    if (shall_fail(COMPILE)) {
        program->log = "the emulator was asked to fail";
        return NVRTC_OUT_OF_MEMORY;
    }
    program->log.clear();
    return compile(*program, std::vector<std::string>(options, options + count));
}

// PTX and machine code are the same here, but a virtual architecture has no machine code. Lengths of strings include
// the terminating null.
XT_EXPORT int nvrtcGetPTXSize(Program* program, size_t* bytes) {
    *bytes = program->image.size();
    return program->image.empty() ? NVRTC_INVALID_PROGRAM : NVRTC_SUCCESS;
}
XT_EXPORT int nvrtcGetPTX(Program* program, char* image) { return copy_out(program->image, false, image); }
XT_EXPORT int nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    *bytes = 0;
    return program->ptx ? NVRTC_SUCCESS : nvrtcGetPTXSize(program, bytes);
}
XT_EXPORT int nvrtcGetCUBIN(Program* program, char* image) {
    return program->ptx ? NVRTC_INVALID_PROGRAM : nvrtcGetPTX(program, image);
}
XT_EXPORT int nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    *bytes = program->log.size() + 1;
    return NVRTC_SUCCESS;
}
XT_EXPORT int nvrtcGetProgramLog(Program* program, char* log) { return copy_out(program->log, true, log); }
