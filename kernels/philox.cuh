// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), the same generator as in
// src/philox.rs: a value depends only on seed, stream and position, so that the CPU draws the same numbers.

struct Words {
    u32 word[4];
};

// Ten rounds: four random words from a counter and a key.
__device__ __forceinline__ Words philox4x32(Words counter, u32 key0, u32 key1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 a = (u64)0xD2511F53 * counter.word[0];
        const u64 b = (u64)0xCD9E8D57 * counter.word[2];
        counter = {{(u32)(b >> 32) ^ counter.word[1] ^ key0, (u32)b, (u32)(a >> 32) ^ counter.word[3] ^ key1, (u32)a}};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

// Block `block` of a stream: its words 4 block … 4 block + 3.
__device__ __forceinline__ Words philox_block(u64 seed, u64 stream, u64 block) {
    const Words counter = {{(u32)block, (u32)(block >> 32), (u32)stream, (u32)(stream >> 32)}};
    return philox4x32(counter, (u32)seed, (u32)(seed >> 32));
}

// Uniform in [0, 1) with 53 random bits, from two words.
__device__ __forceinline__ f64 philox_uniform(u32 high, u32 low) {
    const u64 bits = (u64)high << 32 | low;
    return (f64)(bits >> 11) * (1.0 / 9007199254740992.0);
}
