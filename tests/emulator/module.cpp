// Compiled kernels: packs shared objects as the "machine code" of the emulated card, and loads them.

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "emulator.h"

namespace xt {
namespace {

// Header of an image. The version is that of the emulator's sources; images of other versions are refused.
struct Header {
    char magic[8];
    char version[40];
    char hash[40];
    Origin origin;
    uint64_t bytes;
};
constexpr char MAGIC[8] = {'x', 't', 'e', 'm', 'u', 'l', 'a', 't'};

struct Image {
    uintptr_t begin = ~uintptr_t(0), end = 0;
    size_t shared = 0;
    uintptr_t base;
};

int measure(dl_phdr_info* info, size_t, void* data) {
    Image& image = *static_cast<Image*>(data);
    if (info->dlpi_addr != image.base) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        const uintptr_t begin = image.base + header.p_vaddr;
        if (header.p_type == PT_LOAD) {
            image.begin = begin < image.begin ? begin : image.begin;
            image.end = begin + header.p_memsz > image.end ? begin + header.p_memsz : image.end;
        }
        if (header.p_type == PT_TLS) image.shared = header.p_memsz;
    }
    return 1;
}

// Returns name and size of each shared variable, from the symbols of a shared object.
std::vector<Variable> variables_of(const std::string& object) {
    const auto at = [&](size_t offset) { return object.data() + offset; };
    ElfW(Ehdr) file;
    memcpy(&file, at(0), sizeof file);
    std::vector<ElfW(Shdr)> sections(file.e_shnum);
    memcpy(sections.data(), at(file.e_shoff), sections.size() * sizeof(ElfW(Shdr)));
    std::vector<Variable> variables;
    for (const ElfW(Shdr)& section : sections) {
        if (section.sh_type != SHT_SYMTAB) continue;
        for (size_t offset = 0; offset < section.sh_size; offset += sizeof(ElfW(Sym))) {
            ElfW(Sym) symbol;
            memcpy(&symbol, at(section.sh_offset + offset), sizeof symbol);
            if (ELF64_ST_TYPE(symbol.st_info) != STT_TLS) continue;
            const char* const name = at(sections[section.sh_link].sh_offset + symbol.st_name);
            if (strcmp(name, "_ZL9xt_anchor") != 0) variables.push_back({name, symbol.st_size});
        }
    }
    return variables;
}

const Module* open_module(const std::string& path, const std::string& object, unsigned architecture) {
    void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        report(std::string("a compiled kernel cannot be loaded: ") + dlerror());
        return nullptr;
    }
    link_map* map = nullptr;
    dlinfo(handle, RTLD_DI_LINKMAP, &map);
    Image image;
    image.base = map->l_addr;
    dl_iterate_phdr(measure, &image);
    const auto shared = reinterpret_cast<void* (*)()>(dlsym(handle, "xt_shared_memory"));
    // The linker sorts thread-local memory; this finds its start.
    char* const anchor = static_cast<char*>(shared());
    void* start = nullptr;
    dlinfo(handle, RTLD_DI_TLS_DATA, &start);
    return new Module{handle, image.begin, image.end, image.shared, size_t(anchor - static_cast<char*>(start)),
                      architecture, shared, variables_of(object)};
}

}  // namespace

const std::string& folder() {
    static const std::string folder = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&hash_of), &info);
        // Opened by its real path, so that kernels resolve symbols in this library and not in a second copy.
        char* const path = realpath(info.dli_fname, nullptr);
        const std::string name(path == nullptr ? info.dli_fname : path);
        free(path);
        return name.substr(0, name.rfind('/'));
    }();
    return folder;
}

// Returns 128 bits: two FNV-1a hashes with different offset bases.
std::string hash_of(const std::string& text) {
    uint64_t a = 0xcbf29ce484222325, b = 0x9e3779b97f4a7c15;
    for (unsigned char c : text) {
        a = (a ^ c) * 0x100000001b3;
        b = (b ^ c) * 0x100000001b3;
        b ^= b >> 29;
    }
    char hash[33];
    snprintf(hash, sizeof hash, "%016lx%016lx", a, b);
    return hash;
}

bool read_file(const std::string& path, std::string& bytes) {
    FILE* const file = fopen(path.c_str(), "rb");
    if (file == nullptr) return false;
    bytes.clear();
    char part[65536];
    for (size_t got; (got = fread(part, 1, sizeof part, file)) > 0;) bytes.append(part, got);
    const bool ok = !ferror(file);
    fclose(file);
    return ok;
}

// Written under a temporary name first, so that no reader finds a partial file.
bool write_file(const std::string& path, const std::string& bytes) {
    static std::atomic<unsigned> number{0};
    const std::string part = path + "." + std::to_string(getpid()) + "." + std::to_string(++number);
    FILE* const file = fopen(part.c_str(), "wb");
    if (file == nullptr) return false;
    const bool written = fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
    const bool closed = fclose(file) == 0;
    if (written && closed && rename(part.c_str(), path.c_str()) == 0) return true;
    unlink(part.c_str());
    return false;
}

std::string pack(const std::string& shared_object, const Origin& origin) {
    Header header = {};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    strncpy(header.version, XT_EMULATOR_VERSION, sizeof header.version - 1);
    strncpy(header.hash, hash_of(shared_object).c_str(), sizeof header.hash - 1);
    header.origin = origin;
    header.bytes = shared_object.size();
    return std::string(reinterpret_cast<const char*>(&header), sizeof header) + shared_object;
}

const Module* load(const void* image, Origin& origin) {
    Header header;
    memcpy(&header, image, sizeof header.magic);
    if (memcmp(header.magic, MAGIC, sizeof MAGIC) != 0) return nullptr;
    memcpy(&header, image, sizeof header);
    origin = header.origin;
    if (strncmp(header.version, XT_EMULATOR_VERSION, sizeof header.version - 1) != 0) return nullptr;
    const std::string bytes(static_cast<const char*>(image) + sizeof header, header.bytes);
    const std::string hash = hash_of(bytes);
    if (hash != header.hash) return nullptr;
    static std::mutex lock;
    static std::map<std::string, const Module*> loaded;
    std::lock_guard guard(lock);
    const Module*& module = loaded[hash];
    if (module == nullptr) {
        const std::string path = folder() + "/kernels/modules/" + hash + ".so";
        mkdir((folder() + "/kernels/modules").c_str(), 0777);
        if (access(path.c_str(), R_OK) != 0 && !write_file(path, bytes)) {
            report("cannot write " + path);
            return nullptr;
        }
        module = open_module(path, bytes, origin.architecture);
    }
    return module;
}

const XtKernel* kernel_of(const Module& module, const char* name) {
    return static_cast<const XtKernel*>(dlsym(module.handle, (std::string("xt_kernel_") + name).c_str()));
}

// A variable `s` of kernel `k` has the symbol _ZZ1kE1s; one of a device function may belong to any kernel.
size_t shared_bytes_of(const Module& module, const XtKernel& kernel) {
    size_t bytes = 0;
    for (const Variable& variable : module.shared_variables) {
        const std::string& name = variable.name;
        const size_t digits = name.find_first_not_of("0123456789", 3);
        const size_t length = name.starts_with("_ZZ") && digits > 3 && digits != std::string::npos
                                  ? std::stoul(name.substr(3, digits - 3)) : 0;
        const std::string owner = length > 0 && digits + length <= name.size() ? name.substr(digits, length) : "";
        if (owner == kernel.name || kernel_of(module, owner.c_str()) == nullptr) bytes += variable.bytes;
    }
    return bytes;
}

}  // namespace xt

// Kernels are separate libraries in the same process, which must find the emulator's functions that they call.
__attribute__((constructor)) static void share_symbols() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&share_symbols), &info);
    dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}
