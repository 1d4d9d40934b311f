inline u32 look_up(u32 codes, u32 which, u32 bank) {
    u32 at = bank;
    for (int i = 0; i < 4; i++) at += (codes >> 8 * i & 255) * (which >> 8 * i & 255);
    return emulator::load<u32>(at);
}
