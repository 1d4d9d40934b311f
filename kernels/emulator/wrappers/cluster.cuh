inline u32 cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync() { emulator::cluster_arrive(), emulator::cluster_wait(); }
inline u32 of_block(u32 address, u32 rank) { return emulator::map_rank(address, rank); }
inline void send(u32 to, const float (&v)[4], u32 barrier) { emulator::store_async(to, v, 16, barrier); }
inline void wait_sent(u32 barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }
inline void arrive_at(u32 barrier) { emulator::barrier_arrive(barrier); }
inline uint4 load_there(u32 there, bool valid) { return valid ? emulator::load<uint4>(there) : uint4{}; }
