// Keys that a query sees by position, besides causality; the same as src/ops/attention/window.rs.

struct Window {
    // Largest distance at which a key is kept. May be as large as queries + keys, not more.
    i32 past;

    // The first key that a query at a position sees, negative if it sees all; never decreases with the position.
    __device__ __forceinline__ i32 first_key(i32 position) const { return position - past; }

    // The last position that sees a key; never decreases with the key.
    __device__ __forceinline__ i32 last_position(i32 key) const { return key + past; }
};

// The same as parameters, and a Window of these.
#define WINDOW_VALUES i32 past
#define WINDOW {past}
