inline void add_part(float* to, u32 from, bool first) {
    if (first) emulator::store_bulk(to, from, DQ_BYTES);
    else emulator::add_bulk(to, from, DQ_BYTES);
    stores_commit();
}
inline void part_added() { emulator::wait_groups(emulator::BULK, 0); }
inline void wait_for_turn(const u32* counter, u32 turn) {
    emulator::wait_until([=] { return *counter == turn; }, "wait_for_turn (turn)", turn);
}
inline void end_turn(u32* counter, u32 turn) { *counter = turn + 1; }
